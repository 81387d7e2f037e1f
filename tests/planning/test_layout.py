"""As few blocks are recomputed, and as many stay gathered, as memory allows; plan and run choose alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from support.gradients import assert_close, gradient_of_step, open_sequences
from support.runs import last_event, losses, small_config, start, train_here, train_on_rank
from support.tiny_models import build_config, save_model
from support.tokenizers import build_tokenizer
from support.workers import WorkerGroup
from tunesmith.config import TrainConfig
from tunesmith.data.batches import Batch, Counts
from tunesmith.errors import ModelError
from tunesmith.model.files.state import read_weights
from tunesmith.model.load import load_model_config
from tunesmith.objectives.base import LossOutput, TokenLogProbs
from tunesmith.objectives.sft import SFT
from tunesmith.parallel.activation_checkpointing import count_recomputed, recompute_first
from tunesmith.parallel.mesh import build_mesh
from tunesmith.planning import layout
from tunesmith.planning.dry_run import measure_microbatch, planned_kernels, run_microbatch
from tunesmith.planning.layout import SHARE_FOR_ALL, choose_layout, plan_layout
from tunesmith.planning.memory import (
    Layout,
    PlannedModel,
    build_planned_model,
    estimate_memory,
    estimate_microbatch,
    sequences_per_forward,
)
from tunesmith.runs.folder import RunDir
from tunesmith.train.build import build_model
from tunesmith.train.shortage import factor_after_shortages, shortage_noted

CPU = torch.device("cpu")
NUM_BLOCKS = 3
ModelOf = Callable[[str], Path]
# What is recomputed is left to the program.
OPEN: dict[str, Any] = {"gradient_checkpointing": None}


def plan_tiny(family: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PlannedModel:
    config = TrainConfig(lora_rank=4, **changes)
    return build_planned_model(config, build_config(family, 300, num_hidden_layers=NUM_BLOCKS), dtype)


def plan_uneven() -> PlannedModel:
    """Return a model of which a block in the middle is not trained, and so keeps less."""
    planned = plan_tiny(full_ft=True)
    planned.model.get_submodule("model.layers.1").requires_grad_(False)
    return planned


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "build",
    [
        plan_tiny,
        partial(plan_tiny, "qwen3"),
        partial(plan_tiny, "mixtral"),
        partial(plan_tiny, dtype=torch.float32, full_ft=True),
        plan_uneven,
    ],
)
def test_one_block_of_each_kind_tells_what_all_of_them_hold(
    build: Callable[[], PlannedModel], device_type: str
) -> None:
    kernels = planned_kernels(device_type)
    told = measure_microbatch(build().model, 128, 32, kernels)
    for num_recomputed in range(NUM_BLOCKS + 1):
        model = build().model
        if num_recomputed:
            recompute_first(model, num_recomputed)
        found, _ = run_microbatch(model, 128, 32, kernels)
        live = told.recompute(num_recomputed)
        assert live.activations == found.activations
        # The loss lets go of some hidden states a little earlier or later.
        num_bytes = 128 * model.config.hidden_size * model.get_output_embeddings().weight.dtype.itemsize
        assert 0 <= live.loss_peak - found.loss_peak <= num_bytes
        told_peak, found_peak = (max(each.loss_peak, each.backward_peak) for each in (live, found))
        assert 0 <= told_peak - found_peak <= 2 * num_bytes


def test_as_few_blocks_are_recomputed_as_memory_asks_for() -> None:
    planned, config = plan_tiny(), TrainConfig(lora_rank=4, max_seq_length=512, fsdp="no_shard")
    microbatch = estimate_microbatch(planned, config, "cuda")
    needed = [
        estimate_memory(planned, config, Layout(True, False, n, NUM_BLOCKS), microbatch, "cuda", 1).total
        for n in range(NUM_BLOCKS + 1)
    ]
    for num_recomputed, least in enumerate(needed):
        room = int(least / SHARE_FOR_ALL) + 1
        found, memory = plan_layout(planned, config, "cuda", 1, room)
        assert (found.num_recomputed, memory.total) == (num_recomputed, least)
        found, _ = plan_layout(planned, config, "cuda", 1, room - 2)
        assert found.num_recomputed == min(num_recomputed + 1, NUM_BLOCKS)
    for asked, num_recomputed in ((True, NUM_BLOCKS), (False, 0)):
        config = config.model_copy(update={"gradient_checkpointing": asked})
        found, _ = plan_layout(planned, config, "cuda", 1, int(needed[2] / SHARE_FOR_ALL) + 1)
        assert found.num_recomputed == num_recomputed


def test_a_cpu_runs_a_thousand_tokens_at_once_and_a_gpu_the_whole_microbatch() -> None:
    lengths = (64, 128, 512, 1024, 4096)
    assert [sequences_per_forward(8, length, "cpu") for length in lengths] == [8, 8, 2, 1, 1]
    assert [sequences_per_forward(8, length, "cuda") for length in lengths] == [8] * 5


def test_more_sequences_than_a_cpu_runs_at_once_need_no_more_of_its_memory() -> None:
    planned = plan_tiny()
    needed = {
        (kind, size): estimate_microbatch(
            planned, TrainConfig(max_seq_length=512, per_device_train_batch_size=size), kind
        ).kept.activations
        for kind in ("cpu", "cuda")
        for size in (1, 2, 4)
    }
    assert needed["cpu", 1] < needed["cpu", 2] == needed["cpu", 4]
    assert needed["cuda", 1] < needed["cuda", 2] < needed["cuda", 4]


def test_sharded_blocks_stay_gathered_where_nothing_must_be_recomputed_for_it() -> None:
    planned, config = plan_tiny(full_ft=True), TrainConfig(full_ft=True)
    roomy, most = plan_layout(planned, config, "cuda", 4, 1 << 40)
    assert roomy == Layout(
        replicated=False, reshard_after_forward=False, num_recomputed=0, num_blocks=NUM_BLOCKS
    )
    tight, less = plan_layout(planned, config, "cuda", 4, int(most.total / SHARE_FOR_ALL) - 2)
    assert tight == replace(roomy, reshard_after_forward=True)
    a_block = sum(p.numel() for p in planned.model.get_submodule("model.layers.0").parameters())
    assert most.gathered - less.gathered == 2 * (NUM_BLOCKS - 2) * a_block
    offloaded = config.model_copy(update={"cpu_offload": True})
    assert plan_layout(planned, offloaded, "cuda", 4, 1 << 40)[0].reshard_after_forward


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("room", "is_kept"), [(1 << 40, True), (1, False)])
def test_blocks_stay_gathered_until_the_backward_pass_if_the_layout_says_so(
    room: int, is_kept: bool, deep: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "available_memory", lambda: room)
    config = small_config(deep, rows, tmp_path, full_ft=True, gradient_checkpointing=False)
    model: Any = build_model(config, CPU, build_mesh(0, 1))
    weights = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(NUM_BLOCKS)]
    loss = model(input_ids=torch.arange(8).unsqueeze(0), use_cache=False).logits.sum()
    assert [isinstance(model.get_parameter(name), DTensor) for name in weights] == [not is_kept] * NUM_BLOCKS
    loss.backward()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_keeps_squares_recomputes_all_blocks_on_gpus(attention: str) -> None:
    config = TrainConfig(attn_implementation=attention)
    planned = plan_tiny(attn_implementation=attention)
    on_gpu, on_cpu = (plan_layout(planned, config, kind, 1, 1 << 40)[0] for kind in ("cuda", "cpu"))
    assert on_gpu.num_recomputed == (NUM_BLOCKS if attention == "eager" else 0)
    assert on_cpu.num_recomputed == 0


def test_a_model_that_is_not_run_without_data_recomputes_all_blocks_on_gpus() -> None:
    planned, config = plan_tiny(), TrainConfig(lora_rank=4)

    def look(*_: object) -> None:
        next(planned.model.parameters()).sum().item()

    planned.model.get_submodule("base_model.model.model.norm").register_forward_hook(look)
    with pytest.raises(ModelError, match="`llama`"):
        plan_layout(planned, config, "cuda", 1, 1 << 40)
    for kind, recomputes in (("cuda", True), ("cpu", False)):
        found = choose_layout(planned, config, kind, 1, 1 << 40)
        assert (found.num_recomputed, found.num_blocks) == (NUM_BLOCKS if recomputes else 0, NUM_BLOCKS)
        assert found.replicated


@pytest.mark.parametrize("asked", [False, True])
def test_a_layout_that_the_settings_decide_is_not_measured_for(
    asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    planned, config = plan_tiny(), TrainConfig(lora_rank=4, gradient_checkpointing=asked)
    measured, _ = plan_layout(planned, config, "cpu", 1, 1 << 40)
    planned.model.get_submodule("base_model.model.model.norm").register_forward_hook(lambda *_: 1 / 0)
    with caplog.at_level(logging.INFO, "tunesmith"):
        assert choose_layout(planned, config, "cpu", 1, 1 << 40) == measured
    assert caplog.text == ""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of `NUM_BLOCKS` blocks."""
    folder = tmp_path_factory.mktemp("deep")
    return save_model(folder, build_tokenizer("byte_bpe"), num_hidden_layers=NUM_BLOCKS)


def room_for(config: TrainConfig, num_recomputed: int) -> int:
    """Return the least memory in which no more blocks than that are recomputed."""
    planned = build_planned_model(config, load_model_config(config.model), torch.float32)
    microbatch = estimate_microbatch(planned, config, "cpu")
    whole = planned.fused and config.fsdp != "full_shard"
    lies = Layout(whole, False, num_recomputed, NUM_BLOCKS)
    return int(estimate_memory(planned, config, lies, microbatch, "cpu", 1).total / SHARE_FOR_ALL) + 1


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("changes", [{}, {"fsdp": "full_shard"}, {"full_ft": True}])
def test_a_run_recomputes_what_its_plan_says_and_trains_alike(
    changes: dict[str, Any], deep: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(deep, rows, tmp_path, lora_dropout=0.2, **OPEN, **changes)
    sequences = open_sequences(config, packing=True)
    microbatches = [np.array([0, 1]), np.array([2, 3])]
    kept = gradient_of_step(config, sequences, microbatches)
    room = room_for(config, 2)
    monkeypatch.setattr(layout, "available_memory", lambda: room)
    assert count_recomputed(build_model(config, CPU, build_mesh(0, 1))) == (2, NUM_BLOCKS)
    assert_close(kept, gradient_of_step(config, sequences, microbatches))


@pytest.mark.usefixtures("alone")
def test_a_run_tells_what_it_runs_at_once_and_records_how_many_blocks_it_recomputes(
    deep: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(deep, rows, tmp_path, max_steps=1, per_device_train_batch_size=2, **OPEN)
    room = room_for(config, 1)
    monkeypatch.setattr(layout, "available_memory", lambda: room)
    run = train_here(start(config))
    assert "packed sequences, 2 at a time, on 1 × cpu" in last_event(run, "start")["message"]
    assert "gradient checkpointing 1 of 3 blocks" in last_event(run, "start")["message"]
    resolved = run.read_params()["resolved"]
    assert resolved["gradient_checkpointing"] == "1 of 3 blocks"
    # As runs of before recorded it.
    run.write_params({**run.read_params(), "resolved": {**resolved, "gradient_checkpointing": False}})
    assert set(losses(train_here(start(config.model_copy(update={"max_steps": 2}))))) == {1, 2}


class RunsShort(SFT):
    """As a GPU whose memory the plan didn't know well enough."""

    def loss(self, batch: Batch, counts: Counts, policy: TokenLogProbs) -> LossOutput:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.16 GiB.")


@pytest.mark.usefixtures("alone")
def test_an_attempt_after_a_shortage_counts_with_more(
    deep: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(deep, rows, tmp_path, max_steps=1, eval_steps=0, **OPEN)
    room = room_for(config, 0)
    monkeypatch.setattr(layout, "available_memory", lambda: room)
    job = start(config)
    chosen = []
    for objective in (RunsShort(), SFT()):
        with suppress(torch.OutOfMemoryError), shortage_noted(job.run, rank=0):
            train_here(replace(job, objective=objective))
        chosen.append(job.run.read_params()["resolved"]["gradient_checkpointing"])
    # Of a model as small as this, blocks are less than what is counted more.
    assert chosen == ["off", "on"]
    for rank in (1, 0, 1):  # of the same attempt, of a second, and both of it
        with suppress(torch.OutOfMemoryError), shortage_noted(job.run, rank):
            raise torch.OutOfMemoryError
    assert factor_after_shortages(job.run) == pytest.approx(1.15**2)


@pytest.mark.slow
def test_workers_with_unequal_memory_recompute_as_the_smallest_asks_for(
    deep: Path, rows: Path, tmp_path: Path, two_workers: WorkerGroup
) -> None:
    config = small_config(deep, rows, tmp_path, **OPEN)
    assert two_workers.run(count_with_room, config, [1 << 40, room_for(config, 1)]) == [(1, NUM_BLOCKS)] * 2


def count_with_room(rank: int, world_size: int, config: TrainConfig, rooms: list[int]) -> tuple[int, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "available_memory", lambda: world_size * rooms[rank])
        return count_recomputed(build_model(config, CPU, build_mesh(rank, world_size)))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"fsdp": "full_shard"}, {"full_ft": True}])
def test_blocks_that_stay_gathered_train_as_resharded_ones(
    changes: dict[str, Any], deep: Path, rows: Path, tmp_path: Path, two_workers: WorkerGroup
) -> None:
    runs = []
    for name, room in (("gathered", 1 << 40), ("resharded", 1)):
        config = small_config(deep, rows, tmp_path / name, gradient_checkpointing=False, **changes)
        planned = build_planned_model(config, load_model_config(config.model), torch.float32)
        assert choose_layout(planned, config, "cpu", 2, room).reshard_after_forward == (name != "gathered")
        runs.append(two_workers.run(train_with_room, start(config, num_workers=2), room)[0])
    gathered, resharded = runs
    assert set(losses(gathered, "eval_loss")) == {0, 2, 4}
    for key in ("loss", "eval_loss"):
        assert losses(gathered, key) == losses(resharded, key)
    mine, its = (read_weights(run.latest_checkpoint().path) for run in runs)
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def train_with_room(rank: int, world_size: int, job: Any, room: int) -> RunDir:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "available_memory", lambda: world_size * room)
        return train_on_rank(rank, world_size, job)
