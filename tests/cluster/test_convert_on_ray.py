"""Conversion on a Ray cluster: on which node, seen from here, and with nothing left half-written."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from support.exports import load_weights, write_adapter
from tunesmith.api import convert
from tunesmith.cluster import task
from tunesmith.cluster.resources import Node, connected_nodes
from tunesmith.cluster.task import choose_nodes
from tunesmith.config import ConvertConfig
from tunesmith.errors import ConfigError, ExportError, RunError
from tunesmith.export.convert import export_elsewhere
from tunesmith.runs.tuned import find_tuned
from tunesmith.signals import signal_handlers_kept

ModelOf = Callable[[str], Path]

# A model's own code, which says what has started its process and then takes its time.
NOTED = """
import os
import sys
import time
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

print("the model's own code is read, below", Path(f"/proc/{os.getppid()}/cmdline").read_text(), file=sys.stderr)
time.sleep(SECONDS)


class NotedConfig(LlamaConfig):
    model_type = "noted"


class NotedModel(LlamaForCausalLM):
    config_class = NotedConfig
"""


@pytest.mark.parametrize(
    ("nodes", "chosen"),
    [
        ([Node(16, 0), Node(8, 4), Node(8, 4)], [Node(8, 4), Node(8, 4)]),
        ([Node(0, 0), Node(8, 0)], [Node(8, 0)]),
        ([Node(4, 0), Node(8, 0)], [Node(4, 0), Node(8, 0)]),
        ([Node(0, 0)], []),
    ],
)
def test_the_nodes_with_gpus_convert_else_those_with_cpus(nodes: list[Node], chosen: list[Node]) -> None:
    assert choose_nodes(nodes) == chosen


@pytest.fixture
def adapter(model_of: ModelOf, tmp_path: Path) -> Path:
    return write_adapter(model_of("llama"), tmp_path / "adapter", target_modules=["q_proj"]).folder


def test_without_a_cluster_no_ray_is_started(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = set(psutil.Process().children(recursive=True))
    exported = convert(ConvertConfig(checkpoints_dir=str(adapter), verify=False))
    assert exported.folder == tmp_path / "hf_format"
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with a CPU, and a node that besides has a GPU, if only in name."""
    with signal_handlers_kept(), ExitStack() as stack:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        stack.callback(cluster.shutdown)
        cluster.add_node(num_cpus=1, num_gpus=1)
        yield cluster


@pytest.fixture
def connected(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with signal_handlers_kept(), connected_nodes():
        yield


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_with_gpus_converts_and_is_heard_here(
    connected: None,
    adapter: Path,
    model_of: ModelOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All paths are relative to the folder that this process works in; the node's processes work in another."""
    monkeypatch.chdir(tmp_path)
    model = noted_model(model_of("llama"), Path("noted"), seconds=0)
    config = ConvertConfig(
        checkpoints_dir="adapter",
        model_path=model,
        trust_remote_code=True,
        home=Path("home"),
        output_dir=Path("out"),
    )
    with caplog.at_level(logging.INFO, "tunesmith"):
        exported = convert(config)
    assert exported.folder == tmp_path / "out"
    assert exported.proof is not None and exported.proof.num_flips == 0
    assert load_weights(exported.folder).keys() == load_weights(model).keys()

    (heard, *_) = [line for line in capsys.readouterr().err.splitlines() if "own code is read" in line]
    assert "raylet" in heard and "GPU,1" in heard, "it ran on the node with the GPU"
    log = (tmp_path / "home" / "logs" / "convert_checkpoint_to_hf.log").read_text()
    for said in ("taking adapter", "converting on "):
        assert caplog.text.count(said) == log.count(said) == 1


def test_a_node_that_sees_another_disk_says_so(adapter: Path, tmp_path: Path) -> None:
    config = ConvertConfig(checkpoints_dir=str(adapter))
    absent = tmp_path / "seen-elsewhere" / ".mark"
    with pytest.raises(ConfigError, match=f"the node .* can't see `{absent.parent}`"):
        export_elsewhere(find_tuned(config), config, tmp_path / "out", absent)


@pytest.mark.ray
@pytest.mark.slow
def test_an_error_on_the_node_is_raised_as_it_is_here(connected: None, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="exists already") as error:
        convert(ConvertConfig(checkpoints_dir=str(adapter), output_dir=tmp_path / "out"))
    assert "--overwrite" in str(error.value.hint)
    assert error.value.exit_code == 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_is_busy_is_waited_for_and_given_up(
    connected: None,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import ray

    monkeypatch.setattr(task, "_SAID_AFTER_S", 1)
    monkeypatch.setattr(task, "_PLACED_WITHIN_S", 2)
    busy = ray.remote(lambda: time.sleep(60)).options(num_cpus=1, num_gpus=1).remote()
    with (
        caplog.at_level(logging.INFO, "tunesmith"),
        pytest.raises(ExportError, match="has found no CPU on the cluster in 2 s"),
    ):
        convert(ConvertConfig(checkpoints_dir=str(adapter), output_dir=tmp_path / "out"))
    ray.cancel(busy, force=True)
    assert caplog.text.count("waiting for a CPU of the cluster's nodes") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "exit_code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.long),
    ],
)
def test_whatever_ends_a_conversion_nothing_is_left_half_written(
    number: int, exit_code: int, cluster: Cluster, adapter: Path, model_of: ModelOf, tmp_path: Path
) -> None:
    """The command is signalled; SIGKILL goes to the process on the node instead."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("an older model")
    model = noted_model(model_of("llama"), tmp_path / "noted", seconds=300)
    flags = [f"--model_path={model}", f"--output_dir={output}", "--overwrite", "--trust_remote_code"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "convert", str(adapter), *flags],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    while "own code is read" not in said:
        said += (line := process.stderr.readline())
        assert line, said
    assert unfinished(output), "it is at work"
    (worker,) = processes_of("_run_here")
    (worker if number == signal.SIGKILL else process).send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == exit_code, said
    assert "Traceback" not in said
    assert ("nothing was put in place" in said) == (number == signal.SIGKILL)
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running()
    assert unfinished(output) == []
    assert os.listdir(output) == ["config.json"]


def noted_model(source: Path, folder: Path, seconds: float) -> Path:
    """Write a model that comes with code of its own."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "noted",
        "auto_map": {"AutoConfig": "noted.NotedConfig", "AutoModelForCausalLM": "noted.NotedModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "noted.py").write_text(NOTED.replace("SECONDS", str(seconds)))
    return folder


def unfinished(output: Path) -> list[Path]:
    return [path for path in output.parent.glob(".*") if path.name != f".{output.name}.lock"]


def processes_of(task: str) -> list[psutil.Process]:
    """Return the processes on the cluster that run the task, as Ray's process titles have it."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if " ".join(child.cmdline()).startswith(f"ray::{task}")]
