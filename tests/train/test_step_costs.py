"""What a step may cost, counted: FLOP, bytes moved, waits for a GPU, graph breaks, collectives. Nothing is timed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from support.paths import REPOSITORY
from support.runs import write_rows
from support.step_costs import (
    IN_PLACE_PRODUCTS,
    BytesMoved,
    CollectiveBytes,
    HostWaits,
    on_meta,
    set_up_training,
)
from support.workers import WorkerGroup
from tunesmith.model.kernels.attention import compute_logits
from tunesmith.parallel.blocks import find_blocks
from tunesmith.train.state import Training
from tunesmith.train.step import take_step
from tunesmith.train.validation import evaluate

sys.path.append(str(REPOSITORY / "benchmarks"))

from flops import count_flops, measure_shape
from in_process import lengths_of

pytestmark = pytest.mark.usefixtures("alone")

ModelOf = Callable[[str], Path]

# What a step of the tiny model may cost. Where a cost is meant to change, the figure that its test shows is
# recorded here, rounded up.
CEILINGS = {
    # FLOP of linear layers and loss, as a share of what the shapes ask for; rows are padded a little.
    "linear FLOP": 1.002,
    # FLOP of attention, as a share of what the examples' own triangles of scores ask for: a tile of 128 tokens
    # holds several examples of some 27.
    "attention FLOP": 12.54,
    # Bytes read and written a token, on the CPU's way and on the GPU's.
    "bytes on the CPU": 120_400,
    "bytes on the GPU": 56_000,
}
# How far below its ceiling a cost may be: one copy of each block's hidden states moves 0.004 more bytes.
SLACK = 0.002


def assert_costs(name: str, found: float) -> None:
    """Check that a cost is at most its ceiling, and near it."""
    assert (1 - SLACK) * CEILINGS[name] <= found <= CEILINGS[name], f"{name}: {found}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows for a step of six packs."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", num_rows=140)


@pytest.fixture
def training(model_of: ModelOf, rows: Path, tmp_path: Path) -> Training:
    return set_up_training(model_of("llama"), rows, tmp_path)


def count_needed_flops(training: Training, step: int) -> tuple[float, float]:
    """Return the FLOP that a step needs for linear layers and loss, and for attention."""
    shape, lengths = measure_shape(training.model), lengths_of(training, step)
    num_trained = training.sequences.count(np.concatenate(training.plan.microbatches(step))).trained_tokens
    linear = count_flops(replace(shape, num_layers=0), lengths, num_trained)
    attention = count_flops(shape, lengths, num_trained) - linear
    # The embeddings are frozen: the products that the first block begins with have no gradient to give them.
    first = find_blocks(training.model)[0].self_attn
    num_spared = sum(
        layer.base_layer.weight.numel() + layer.lora_A["default"].weight.numel()
        for layer in (first.q_proj, first.k_proj, first.v_proj)
    )
    return linear - 2 * sum(lengths) * num_spared, attention


def test_a_step_computes_what_its_shapes_ask_for(training: Training) -> None:
    linear, attention = count_needed_flops(training, step=1)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE_PRODUCTS) as counter:
        take_step(training, 1)
    counts = counter.get_flop_counts()["Global"]
    of_matrices = sum(counts[func] for func in counts if func.__name__.rstrip("_") in ("mm", "addmm"))
    assert_costs("linear FLOP", of_matrices / linear)
    assert_costs("attention FLOP", (counter.get_total_flops() - of_matrices) / attention)


def count_bytes_per_token(training: Training, step: int) -> float:
    with BytesMoved() as moved:
        result = take_step(training, step)
    return moved.total / result.counts.tokens


def test_a_step_moves_no_more_bytes_than_recorded(training: Training) -> None:
    take_step(training, 1)  # what is made once and kept
    on_cpu = count_bytes_per_token(training, 1)
    assert on_cpu == count_bytes_per_token(training, 1)
    assert_costs("bytes on the CPU", on_cpu)


def test_a_step_on_a_gpu_moves_no_more_bytes_than_recorded(training: Training) -> None:
    with on_meta(training) as remote, HostWaits():
        take_step(remote, 1)
        on_gpu = count_bytes_per_token(remote, 1)
        assert on_gpu == count_bytes_per_token(remote, 1)
    assert_costs("bytes on the GPU", on_gpu)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_waits_for_a_gpu_once_however_many_microbatches_it_has(
    recompute: bool, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    training = set_up_training(model_of("llama"), rows, tmp_path, gradient_checkpointing=recompute)
    assert len(training.plan.microbatches(1)) == 3
    with on_meta(training) as remote, HostWaits() as waits:
        result = take_step(remote, 1)
    assert result.is_finite
    assert (waits.reads, waits.blocking_copies) == (1, 0)


def test_an_evaluation_waits_for_a_gpu_once(training: Training) -> None:
    with on_meta(training) as remote, HostWaits() as waits:
        assert remote.validation is not None
        evaluate(remote, remote.validation)
    assert (waits.reads, waits.blocking_copies) == (1, 0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_block_is_one_graph(family: str, model_of: ModelOf, rows: Path, tmp_path: Path) -> None:
    training = set_up_training(model_of(family), rows, tmp_path)
    calls: list[tuple[nn.Module, Any, Any]] = []
    with on_meta(training) as remote:
        batch = remote.sequences.collate(remote.plan.microbatches(1)[0]).to(remote.worker.device)
        blocks = find_blocks(remote.model)
        hooks = [
            block.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
            for block in blocks
        ]
        compute_logits(remote.model, batch)
        for hook in hooks:
            hook.remove()
        assert [block for block, _, _ in calls] == blocks
        for block, args, kwargs in calls:
            traced = torch._dynamo.explain(block)(*args, **kwargs)
            assert (traced.graph_count, traced.break_reasons) == (1, [])


def count_collectives(
    rank: int, world_size: int, model: Path, rows: Path, folder: Path
) -> tuple[Counter[tuple[str, int]], int]:
    """Return the collectives of a step by name and bytes, and the number of trained weights."""
    training = set_up_training(model, rows, folder / str(rank), rank, world_size)
    with CollectiveBytes() as collectives:
        take_step(training, 1)
    return collectives.counts, sum(p.numel() for p in training.model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_workers_exchange_the_gradients_once_a_step(
    model_of: ModelOf, rows: Path, tmp_path: Path, two_workers: WorkerGroup
) -> None:
    decisions = 2 * 8  # loss and wish to stop, in float64
    for counts, num_trained in two_workers.run(count_collectives, model_of("llama"), rows, tmp_path):
        assert counts == {("allreduce_", 4 * num_trained): 1, ("allreduce_", decisions): 1}
