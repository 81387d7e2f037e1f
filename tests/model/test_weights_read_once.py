"""Of weights that are sharded each rank reads its slices alone: the disk is read once by all, or once by each node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.gradients import CPU
from support.runs import small_config
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from support.workers import WorkerGroup, on_nodes_of_two
from tunesmith.parallel.mesh import build_mesh
from tunesmith.train.build import build_model

LARGE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}


def count_read_bytes(
    rank: int, world_size: int, small: Path, large: Path, home: Path, changes: dict[str, Any]
) -> int:
    """Return the bytes that a rank asks the system for while it builds the large model, from the disk or its cache."""

    def read_by(folder: Path) -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        before = int(lines[0].removeprefix("rchar: "))
        build_model(small_config(folder, "rows.jsonl", home, **changes), CPU, build_mesh(rank, world_size))
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(lines[0].removeprefix("rchar: ")) - before

    read_by(small)  # what is imported once
    return read_by(large)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of bytes")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_node_reads_the_weights_once(family: str, tmp_path: Path, four_workers: WorkerGroup) -> None:
    # Two experts can't be shared out to four ranks: there their rows are.
    tokenizer, experts = build_tokenizer("byte_bpe"), {"num_local_experts": 2} if family == "mixtral" else {}
    small = save_model(tmp_path / "small", tokenizer, family, torch.bfloat16, **experts)
    large = save_model(tmp_path / "large", tokenizer, family, torch.bfloat16, **experts, **LARGE)
    num_bytes = (large / "model.safetensors").stat().st_size

    def count(fsdp: str) -> list[int]:
        settings = {"fsdp": fsdp, "dtype": "bfloat16"}
        return four_workers.run(on_nodes_of_two, count_read_bytes, small, large, tmp_path, settings)

    assert count("full_shard") == pytest.approx([num_bytes / 4] * 4, rel=0.05)
    assert count("hybrid_shard") == pytest.approx([num_bytes / 2] * 4, rel=0.05)
