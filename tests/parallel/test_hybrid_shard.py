"""Weights sharded within a node and replicated across nodes: the same training, and checkpoints for any layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from support.gradients import assert_close, gradient_of_step, open_sequences
from support.runs import last_event, losses, small_config, start, train_here, train_on_rank
from support.tiny_models import build_config
from support.workers import WorkerGroup, on_nodes_of_two
from tunesmith.cli import main
from tunesmith.config import TrainConfig
from tunesmith.data.batches import Sequences
from tunesmith.errors import ConfigError, ResourceError
from tunesmith.model.files.state import read_weights
from tunesmith.parallel.mesh import REPLICATE, SHARD, Mesh, build_mesh
from tunesmith.parallel.nodes import Place, explain_unequal
from tunesmith.planning.layout import SHARE_FOR_ALL, plan_layout
from tunesmith.planning.memory import build_planned_model
from tunesmith.planning.workers import imagine_workers
from tunesmith.runs.folder import RunDir
from tunesmith.train.choices import check_sharding, keep_recorded

pytestmark = pytest.mark.usefixtures("alone")

# Seven for four ranks: two each, and one runs an empty one.
MICROBATCHES = [np.array([row]) for row in range(7)]


def differentiate(rank: int, world_size: int, config: TrainConfig, rows: Sequences) -> dict[str, Tensor]:
    mesh = build_mesh(rank, world_size)
    assert mesh.axes == {REPLICATE: 2, SHARD: 2}
    return gradient_of_step(config, rows, MICROBATCHES, mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"full_ft": True}], ids=str)
def test_two_nodes_of_two_compute_what_one_rank_does(
    changes: dict[str, Any],
    model_of: Callable[[str], Path],
    rows: Path,
    tmp_path: Path,
    four_workers: WorkerGroup,
) -> None:
    config = small_config(model_of("llama"), rows, tmp_path, fsdp="hybrid_shard", lora_dropout=0, **changes)
    sequences = open_sequences(config, packing=True)
    expected = gradient_of_step(config, sequences, MICROBATCHES)
    for found in four_workers.run(on_nodes_of_two, differentiate, config, sequences):
        assert_close(found, expected)


def fork_run(run: RunDir, home: Path, after_step: int) -> None:
    """Copy a run as it was at a checkpoint."""
    shutil.copytree(run.home, home)
    copy = RunDir(home, run.results_dir, run.model_name, run.run_name)
    for checkpoint in copy.checkpoints():
        if checkpoint.step > after_step:
            shutil.rmtree(checkpoint.path)


@pytest.mark.slow
@pytest.mark.parametrize("full_ft", [False, True])
def test_a_run_on_two_nodes_goes_as_any_other_and_goes_on_as_any_other(
    full_ft: bool,
    model_of: Callable[[str], Path],
    rows: Path,
    tmp_path: Path,
    two_workers: WorkerGroup,
    four_workers: WorkerGroup,
) -> None:
    def configure(home: str, **changes: Any) -> TrainConfig:
        settings = {"full_ft": full_ft, "learning_rate": 2e-3, "save_total_limit": 9, **changes}
        return small_config(model_of("llama"), rows, tmp_path / home, **settings)

    one = train_here(start(configure("one"), num_workers=1))
    (full, *_) = four_workers.run(train_on_rank, start(configure("full", fsdp="full_shard")))
    hybrid_job = start(configure("hybrid", fsdp="hybrid_shard"))
    (hybrid, *_) = four_workers.run(on_nodes_of_two, train_on_rank, hybrid_job)
    assert full.read_params()["resolved"]["fsdp"] == "full_shard"
    assert hybrid.read_params()["resolved"]["fsdp"] == "hybrid_shard"
    assert "weights sharded within each node" in last_event(hybrid, "start")["message"]

    fork_run(hybrid, tmp_path / "two", after_step=2)
    two_job = start(configure("two", fsdp="full_shard"))
    two_workers.run(train_on_rank, two_job)
    fork_run(two_job.run, tmp_path / "again", after_step=2)
    again = train_here(start(configure("again")))
    for run in (full, hybrid, two_job.run, again):
        for key in ("loss", "eval_loss", "grad_norm", "trained_tokens"):
            assert losses(run, key) == pytest.approx(losses(one, key), rel=1e-4), key
        for name, weight in read_weights(run.latest_checkpoint().path).items():
            expected = read_weights(one.latest_checkpoint().path)[name]
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-3)


def test_an_older_runs_weights_stay_sharded_over_all_nodes() -> None:
    mesh = Mesh({REPLICATE: 2, SHARD: 2}, 0, dist.group.WORLD)
    recorded = {"dtype": "float32", "attn_implementation": "varlen", "use_gpu": False}
    for fsdp in ("full_shard", "hybrid_shard"):
        before = {**recorded, "fsdp": fsdp, "num_workers": 4}
        assert keep_recorded(TrainConfig(), before, mesh, use_gpu=False).fsdp == fsdp
    moved = Mesh({SHARD: 4}, 0, dist.group.WORLD, "the nodes have 3, 1 workers")
    assert keep_recorded(TrainConfig(), before, moved, use_gpu=False).fsdp == "auto"
    with pytest.raises(ResourceError, match=r"`hybrid_shard`, but the nodes have 3, 1 workers"):
        check_sharding(TrainConfig(fsdp="hybrid_shard"), moved)
    check_sharding(TrainConfig(), moved)


def test_weights_are_sharded_within_nodes_where_memory_allows_it() -> None:
    config = TrainConfig(full_ft=True, max_seq_length=512, gradient_checkpointing=True)
    planned = build_planned_model(config, build_config("llama", 300, num_hidden_layers=3), torch.bfloat16)
    plan = partial(plan_layout, planned, device_type="cuda", num_workers=16, num_nodes=2)
    _, of_eight = plan_layout(planned, config, "cuda", 8, 1 << 40)
    layout, roomy = plan(config, room=1 << 40)
    assert (layout.num_replicas, layout.reshard_after_forward, roomy) == (2, False, of_eight)
    _, tight = plan(config.model_copy(update={"fsdp": "hybrid_shard"}), room=1)
    layout, least = plan(config, room=int(tight.total / SHARE_FOR_ALL) - 2)
    assert layout.num_replicas == 1
    assert least.total < tight.total
    layout, _ = plan(config.model_copy(update={"fsdp": "full_shard"}), room=1 << 40)
    assert layout.num_replicas == 1


def test_a_plan_says_that_weights_are_sharded_within_nodes(
    model_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "plan",
        "--model_path",
        str(model_of("llama")),
        "--full_ft",
        "--num_workers",
        "8",
        "--gpu",
        "H100",
    ]
    for per_node, placed in (
        ("8", "weights sharded, gathered"),
        ("4", "weights sharded within each of 2 nodes"),
    ):
        assert main([*words, "--gpus_per_node", per_node]) == 0
        assert placed in capsys.readouterr().out
    assert main([*words, "--gpus_per_node", "0"]) == 2


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ([(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)], None),
        ([(0, 0, 4), (0, 1, 4), (0, 2, 4), (0, 3, 4)], None),
        ([(0, 0, 1), (1, 0, 1)], None),
        ([(0, 0, 3), (0, 1, 3), (0, 2, 3), (1, 0, 1)], "the nodes have 3, 1 workers"),
        ([(0, 0, 2), (1, 0, 2), (0, 1, 2), (1, 1, 2)], "consecutive"),
        ([(0, 0, 2), (1, 1, 2), (1, 0, 2), (0, 1, 2)], "consecutive"),
    ],
    ids=str,
)
def test_nodes_are_an_axis_where_each_has_equally_many_consecutive_ranks(
    places: list[tuple[int, int, int]], reason: str | None
) -> None:
    found = explain_unequal([Place(*place) for place in places])
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


@pytest.mark.parametrize(
    ("num_workers", "per_node", "num_nodes"),
    [(8, "8", 1), (16, "8", 2), (12, "8", 1), (4, "8", 1), (8, "4", 2)],
)
def test_imagined_workers_are_on_nodes(num_workers: int, per_node: str, num_nodes: int) -> None:
    workers = imagine_workers(TrainConfig(num_workers=num_workers), "H100", per_node)
    assert workers.num_equal_nodes == num_nodes


def test_a_plan_refuses_nodes_that_workers_do_not_fill() -> None:
    config = TrainConfig(num_workers=12, fsdp="hybrid_shard")
    with pytest.raises(ConfigError, match="12 workers don't fill nodes of 8"):
        imagine_workers(config, "H100", "8")
    assert imagine_workers(config, "H100", "4").num_equal_nodes == 3
    assert imagine_workers(config, "H100", "16").num_equal_nodes == 1
