"""A model that is loaded for a GPU changes nothing that the process's next model gets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import ModelRef
from tunesmith.model.kernels.install import GPU, install_kernels
from tunesmith.model.load import load_model

LIBRARIES = modeling_llama, modeling_qwen3


def what_is_there() -> Iterator[tuple[str, Any]]:
    for module in LIBRARIES:
        for name, value in vars(module).items():
            yield f"{module.__name__}.{name}", value
            if isinstance(value, type) and issubclass(value, nn.Module):
                yield from ((f"{name}.{own}", its) for own, its in vars(value).items())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_two_loads_leave_transformers_as_it_was(family: str, tmp_path: Path) -> None:
    before = dict(what_is_there())
    folder = save_model(tmp_path / "model", build_tokenizer("byte_bpe"), family)
    for _ in range(2):
        model = load_model(ModelRef(folder), torch.device("cuda"), torch.bfloat16)
        install_kernels(model, GPU)
    after = dict(what_is_there())
    assert [name for name, value in before.items() if after.get(name) is not value] == []
