"""A Ray cluster that exists already, and what each worker gets of it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.commands import Command
from support.runs import losses, small_config, write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.cluster.resources import Allocation, Node, allocate
from tunesmith.config import TrainConfig
from tunesmith.errors import ResourceError

ADDRESS = "127.0.0.1:6397"


@pytest.mark.parametrize(
    ("nodes", "settings", "expected"),
    [
        ([Node(8, 0)], {}, Allocation(1, False, 8)),
        ([Node(8, 0)], {"num_workers": 3}, Allocation(3, False, 2)),
        ([Node(3, 0), Node(3, 0)], {"num_workers": 3}, Allocation(3, False, 1)),
        ([Node(4, 0), Node(2, 0)], {"num_workers": 3}, Allocation(3, False, 2)),
        ([Node(0, 0), Node(32, 8), Node(32, 8)], {}, Allocation(16, True, 1, 0, 4)),
        ([Node(32, 8)], {"num_workers": 4}, Allocation(4, True, 1, 0, 4)),
        ([Node(32, 8)], {"use_gpu": False, "num_workers": 4}, Allocation(4, False, 8)),
    ],
)
def test_workers_get_what_fits(nodes: list[Node], settings: dict[str, object], expected: Allocation) -> None:
    assert allocate(TrainConfig(**settings), nodes, "the cluster") == expected


def test_gpus_by_default_are_all_the_cluster_has() -> None:
    allocation = allocate(TrainConfig(), [Node(16, 2), Node(16, 2)], "the cluster")
    assert allocation.resources_per_worker == {"CPU": 1.0, "GPU": 1.0}
    assert allocation.num_workers == 4


@pytest.mark.parametrize(
    ("nodes", "num_threads"),
    [
        ([Node(16, 2), Node(96, 8)], 8),
        ([Node(4, 8)], 1),
        ([Node(64, 0), Node(0, 1), Node(12, 1)], 12),  # one worker a CPU: none on the second
    ],
)
def test_workers_on_gpus_take_their_share_of_the_cpus_and_ask_for_one(
    nodes: list[Node], num_threads: int
) -> None:
    allocation = allocate(TrainConfig(num_workers=1), nodes, "the cluster")
    assert allocation.num_threads == num_threads
    assert allocation.resources_per_worker == {"CPU": 1.0, "GPU": 1.0}
    assert allocation.num_cpus == 1


@pytest.mark.parametrize("settings", [{"num_workers": 3}, {"use_gpu": True}])
def test_more_than_there_is_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ResourceError, match=r"the cluster has (2 CPUs|no GPU)"):
        allocate(TrainConfig(**settings), [Node(2, 0)], "the cluster")


@pytest.mark.parametrize(
    ("nodes", "settings", "expected"),
    [
        ([Node(32, 8)], {"num_workers": 16}, Allocation(16, True, 1, 8, 4)),
        ([Node(32, 8)], {"num_workers": 4}, Allocation(4, True, 1, 0, 4)),
        ([Node(32, 8)], {}, Allocation(8, True, 1, 0, 4)),
        ([Node(0, 0)], {"num_workers": 16, "use_gpu": True}, Allocation(16, True, 1, 16)),
        ([Node(4, 0)], {"num_workers": 6}, Allocation(6, False, 1, 2)),
    ],
)
def test_an_elastic_cluster_is_asked_for_more_than_there_is(
    nodes: list[Node],
    settings: dict[str, object],
    expected: Allocation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAYTRAIN_ELASTIC", "1")
    assert allocate(TrainConfig(**settings), nodes, "the cluster") == expected


@pytest.mark.parametrize("settings", [{}, {"use_gpu": True}, {"num_workers": 2}])
@pytest.mark.parametrize("elastic", ["", "1"])
def test_without_any_worker_the_error_says_so(
    settings: dict[str, object], elastic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTRAIN_ELASTIC", elastic)
    with pytest.raises(ResourceError, match="no worker is there"):
        allocate(TrainConfig(**settings), [Node(0, 0)], "the cluster")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-these-tests-alone")
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command = [*ray, f"--port={ADDRESS.rsplit(':')[-1]}", "--num-cpus=2", "--include-dashboard=false"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    host, port = ADDRESS.split(":")
    deadline = time.monotonic() + 60
    with socket.socket() as probe:
        while probe.connect_ex((host, int(port))) != 0:
            assert time.monotonic() < deadline, "ray start doesn't answer"
            time.sleep(0.5)
    yield
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.wait()


@pytest.mark.ray
@pytest.mark.slow
def test_the_cluster_of_ray_address_is_used_and_left_running(cluster: None, tmp_path: Path) -> None:
    model = save_model(tmp_path / "tiny", build_tokenizer("byte_bpe"))
    config = small_config(model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "home", num_workers=2)

    too_many = Command(config, "--num_workers=3", RAY_ADDRESS=ADDRESS)
    assert too_many.wait() == 2
    assert f"the Ray cluster at {ADDRESS} has 2 CPUs" in too_many.output()
    assert not too_many.run.params_path.exists()

    for max_steps in (4, 6):
        command = Command(config, f"--max_steps={max_steps}", RAY_ADDRESS=ADDRESS)
        assert command.wait() == 0, command.output()
    assert sorted(losses(command.run)) == [1, 2, 3, 4, 5, 6]


def test_an_address_where_nothing_answers_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.cluster.resources import connected_nodes

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with (
        pytest.raises(ResourceError, match=r"no Ray cluster answers at `RAY_ADDRESS` \(127.0.0.1:1\)"),
        connected_nodes(),
    ):
        pass
