"""Evaluation on a Ray cluster: who gets which GPUs, and what becomes of the work of a node that is lost."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from tunesmith.cluster import replicas
from tunesmith.cluster.pool import RayPool, choose_pool
from tunesmith.cluster.resources import Node, connected_nodes
from tunesmith.config import EvaluateConfig, ModelRef
from tunesmith.errors import ConfigError, EvaluationError, ModelError, ResourceError, TunesmithError
from tunesmith.evaluate.engines.base import EngineSpec, Generation, Request
from tunesmith.evaluate.engines.choose import make_engine
from tunesmith.evaluate.engines.pool import LocalPool
from tunesmith.signals import signal_handlers_kept

ModelOf = Callable[[str], Path]

HEAD = Node(16, 0)


@pytest.mark.parametrize(
    ("nodes", "settings", "num_replicas", "gpus_each", "num_threads"),
    [
        ([HEAD, Node(8, 4), Node(8, 4)], {}, 8, 1, None),
        ([HEAD, Node(8, 4), Node(8, 4)], {"num_replicas": 3}, 3, 1, None),
        ([HEAD, Node(8, 4), Node(8, 1)], {"tensor_parallel_size": 2}, 2, 2, None),
        ([HEAD, Node(8, 4), Node(8, 1)], {"tensor_parallel_size": 4}, 1, 4, None),
        ([HEAD, Node(4, 0)], {}, 1, 0, 16),
        ([HEAD, Node(4, 0)], {"num_replicas": 2}, 2, 0, 8),
        ([Node(0, 0), Node(1, 0), Node(1, 0)], {"num_replicas": 2}, 2, 0, 1),
    ],
)
def test_replicas_fill_the_gpus_of_the_nodes_else_share_the_cpus_of_one(
    nodes: list[Node],
    settings: dict[str, Any],
    num_replicas: int,
    gpus_each: int,
    num_threads: int | None,
) -> None:
    pool = choose_pool(EvaluateConfig(engine="vllm", **settings), nodes, "the cluster")
    assert isinstance(pool, RayPool)
    assert (pool.num_replicas, pool.gpus_each, pool.num_threads) == (num_replicas, gpus_each, num_threads)
    assert pool.use_gpu == (gpus_each > 0)


@pytest.mark.parametrize(("node", "use_gpu"), [(Node(4, 1), True), (Node(4, 0), False)])
def test_one_replica_on_this_machine_needs_no_ray(node: Node, use_gpu: bool) -> None:
    pool = choose_pool(EvaluateConfig(), [node], "this machine")
    assert isinstance(pool, LocalPool)
    assert pool.use_gpu == use_gpu


@pytest.mark.parametrize(
    ("nodes", "settings", "kind", "message"),
    [
        ([HEAD, Node(8, 4)], {"num_replicas": 5}, ResourceError, "`num_replicas` is 5, but .* holds 4"),
        ([HEAD, Node(8, 3)], {"num_replicas": 2, "tensor_parallel_size": 2}, ResourceError, "holds 1"),
        ([HEAD, Node(8, 4)], {"tensor_parallel_size": 8}, ResourceError, "no node of .* has 8 GPUs"),
        ([HEAD], {"num_replicas": 17}, ResourceError, "holds 16"),
        ([HEAD], {"tensor_parallel_size": 2}, ResourceError, "no node of .* has 2 GPUs"),
        (
            [HEAD, Node(8, 4)],
            {"tensor_parallel_size": 2, "engine": "transformers"},
            ConfigError,
            "transformers generates on one GPU",
        ),
    ],
)
def test_more_than_there_is_is_refused(
    nodes: list[Node], settings: dict[str, Any], kind: type[TunesmithError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        choose_pool(EvaluateConfig(**{"engine": "vllm", **settings}), nodes, "the cluster")


def test_memory_that_runs_out_here_is_an_error_with_a_remedy(model_of: ModelOf) -> None:
    pool = LocalPool(use_gpu=False, num_threads=1)
    with (
        pytest.raises(EvaluationError, match="MemoryError") as caught,
        pool.load("transformers", spec_of(model_of("llama"))),
    ):
        bytearray(1 << 60)
    assert caught.value.hint is not None
    assert "smaller --batch_size" in caught.value.hint


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that runs nothing and two nodes of one CPU, which this process is connected to."""
    with signal_handlers_kept(), ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        stack.callback(cluster.shutdown)
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", cluster.address)
        signal.signal(signal.SIGTERM, _on_sigterm)
        nodes, place = stack.enter_context(connected_nodes())
        assert sorted(node.cpus for node in nodes) == [0, 1, 1]
        assert cluster.address in place
        yield cluster


def _on_sigterm(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


@pytest.mark.ray
@pytest.mark.slow
def test_connecting_to_a_cluster_leaves_the_signal_handlers_in_place(cluster: Cluster) -> None:
    assert signal.getsignal(signal.SIGTERM) is _on_sigterm


@pytest.mark.ray
@pytest.mark.slow
def test_the_work_of_a_lost_node_is_done_by_the_others(
    cluster: Cluster, model_of: ModelOf, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_of(model_of("llama"))
    requests = [Request(n, "tuned", (1 + n % 200, 7, 11)) for n in range(160)]
    received: list[Generation] = []
    with replicas_of_one_cpu(2).load("transformers", spec) as generate:
        wait_until_both_are_loaded()
        for together in generate(requests):
            received += together
            if len(received) == 20:
                cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    cluster.add_node(num_cpus=1)
    assert re.search("a replica is lost, [1-9][0-9]* samples go", caplog.text)
    assert sorted(generation.sample for generation in received) == list(range(160))
    with closing(make_engine("transformers", spec)) as engine:
        expected = [generation for together in engine.generate(requests[:8]) for generation in together]
    assert by_sample(received)[:8] == by_sample(expected)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": ModelRef(Path("/absent"))}, ModelError, "/absent"),
        ({"dtype": "float31"}, EvaluationError, "the evaluation failed: AttributeError: .*float31"),
    ],
)
def test_a_replica_that_fails_while_loading_is_an_error_of_ours(
    cluster: Cluster, model_of: ModelOf, changes: dict[str, Any], kind: type[TunesmithError], message: str
) -> None:
    spec = replace(spec_of(model_of("llama")), **changes)
    with pytest.raises(kind, match=message) as caught, replicas_of_one_cpu(1).load("transformers", spec):
        pass
    assert type(caught.value) is kind
    assert caught.value.hint is not None


@pytest.mark.ray
@pytest.mark.slow
def test_replicas_that_keep_dying_while_they_load_end_the_evaluation(
    cluster: Cluster, model_of: ModelOf, tmp_path: Path
) -> None:
    """The model's own code ends the process, as a lack of memory does."""
    folder = deadly_model(model_of("llama"), tmp_path / "deadly")
    spec = replace(spec_of(folder), model=ModelRef(folder, trust_remote_code=True))
    with (
        pytest.raises(EvaluationError, match=r"4 times a process on Ray has died: .*worker") as caught,
        replicas_of_one_cpu(1).load("transformers", spec),
    ):
        pass
    assert caught.value.hint is not None


@pytest.mark.ray
@pytest.mark.slow
def test_replicas_that_find_no_room_are_waited_for_and_given_up(
    cluster: Cluster,
    model_of: ModelOf,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(replicas, "_SAID_AFTER_S", 1)
    monkeypatch.setattr(replicas, "_PLACED_WITHIN_S", 3)
    too_large = RayPool(2, use_gpu=False, num_threads=1, gpus_each=0, cpus_each=2)
    with (
        pytest.raises(EvaluationError, match="no replica of 2 CPUs has found room"),
        too_large.load("transformers", spec_of(model_of("llama"))),
    ):
        pass
    assert caplog.text.count("waiting for 4 of the cluster's CPUs") == 1


def replicas_of_one_cpu(num_replicas: int) -> RayPool:
    return RayPool(num_replicas, use_gpu=False, num_threads=1, gpus_each=0, cpus_each=1)


def wait_until_both_are_loaded() -> None:
    deadline = time.monotonic() + 60
    while len(idle_replicas()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def idle_replicas() -> list[psutil.Process]:
    """Return the replicas' processes that run no method, as Ray's process titles have it."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if " ".join(child.cmdline()).strip() == "ray::Replica"]


def spec_of(model: Path) -> EngineSpec:
    return EngineSpec(
        model=ModelRef(model),
        adapter=None,
        dtype="float32",
        max_model_len=128,
        max_tokens=40,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        stop_token_ids=(0,),
        seed=0,
        batch_size=1,
        num_threads=1,
    )


def by_sample(generations: list[Generation]) -> list[Generation]:
    return sorted(generations, key=lambda generation: generation.sample)


def deadly_model(source: Path, folder: Path) -> Path:
    """Write a model whose own code kills the process that loads it."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "deadly", "auto_map": {"AutoConfig": "deadly.DeadlyConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "deadly.py").write_text("import os\nimport signal\n\nos.kill(os.getpid(), signal.SIGKILL)\n")
    return folder
