"""What a failed training says to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunesmith.failures import explain_training
from tunesmith.runs.folder import RunDir


def test_a_worker_without_memory_is_told_to_train_smaller_batches(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="allocate memory") as failure:
        torch.empty(1 << 55)
    explained = explain_training(failure.value, RunDir(tmp_path, tmp_path, "model", "run"))
    assert explained.hint is not None
    assert "--per_device_train_batch_size" in explained.hint
    assert "no checkpoint was written yet" in explained.hint


def test_another_failure_is_not_blamed_on_memory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.ones(2, 3) @ torch.ones(2, 3)
    explained = explain_training(failure.value, RunDir(tmp_path, tmp_path, "model", "run"))
    assert "RuntimeError: mat1 and mat2" in explained.message
    assert explained.hint is not None and "batch_size" not in explained.hint
