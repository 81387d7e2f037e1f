"""The rendered job runs: the chart's objects on a real Ray, in the pods that KubeRay would make of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.helm import Values, render
from support.runs import events, losses
from support.staged_cluster import TIMEOUT_S, StagedCluster
from support.staged_pods import Pod
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from support.values import FINE_TUNE
from tunesmith.runs.folder import find_runs

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NODE = {"cpu": 1, "memory": "2Gi"}
MODEL = "pretrained-models/Qwen/Qwen3-14B"
TRAINING = (
    '--hf_model_id="Qwen/Qwen3-14B"',
    "--model_path=$MODEL_PATH",
    "--dataset_name=/fsx/rows.jsonl",
    "--dataset_config=none",
    "--max_steps=6",
    "--eval_steps=3",
    "--max_seq_length=128",
    "--lora_rank=4",
    "--logging_steps=1",
    "--num_proc=1",
)


@dataclass(frozen=True)
class Storage:
    """What the claims of the example hold: a model and rows on pv-fsx, the homes of the releases on pv-efs."""

    folder: Path

    def cluster(self, values: Values, release: str) -> StagedCluster:
        """Return a cluster whose pods mount it; its pods' logs lie beside it."""
        pods = self.folder / "pods" / f"{release}-{time.monotonic_ns()}"
        claims = {"pv-fsx": self.folder / "fsx", "pv-efs": self.folder / "efs"}
        return StagedCluster(render(values, release), pods, claims)

    def run(self, values: Values, release: str) -> tuple[str, str]:
        """Run the job to its end; return its status and its log."""
        with self.cluster(values, release) as cluster:
            cluster.submit()
            return cluster.wait(), cluster.logs()

    def home(self, release: str) -> Path:
        return self.folder / "efs" / "home" / release


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    folder = tmp_path_factory.mktemp("storage")
    (folder / "efs").mkdir()
    tokenizer = build_tokenizer("byte_bpe")
    save_model(folder / "fsx" / MODEL, tokenizer, "qwen3")
    # Large enough that a step takes some tenths of a second, so that there is something to kill.
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    save_model(folder / "fsx" / "larger", tokenizer, "llama", **shape)
    rows = ({"instruction": "Add.", "input": f"{i} and {i}", "output": str(2 * i)} for i in range(200))
    (folder / "fsx" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Storage(folder)


def example(script: str, flags: tuple[str, ...], **values: Any) -> Values:
    """Return the values of the example, for this script, these flags and nodes as there are here."""
    return {
        **FINE_TUNE,
        "ray": {**FINE_TUNE["ray"], "runtime_env_yaml": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
        "resources": {"nnodes": 1, "requests": NODE, "limits": NODE},
        "pre_script": [
            "mkdir -p $HOME/logs",
            f"PROCESS_LOG=$HOME/logs/{script}.log",
            "cd $SCRIPTS_DIR",
        ],
        "post_script": ["echo done > $HOME/post_script"],
        "train": {
            "env": FINE_TUNE["train"]["env"],
            "command": ["python"],
            "args": [f"{script}.py", *flags, "2>&1 | tee $PROCESS_LOG"],
        },
        **values,
    }


def test_training_evaluation_and_conversion_follow_on_the_same_storage(storage: Storage) -> None:
    status, log = storage.run(example("fine_tune", TRAINING), "sft")
    assert status == "SUCCEEDED", log
    home = storage.home("sft")
    (run,) = find_runs(home)
    assert run.model_name == "Qwen3-14B"
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert (home / "post_script").exists()
    for pattern in (
        "logs/fine_tune.log",
        "results/Qwen3-14B/ray_results/TorchTrainer_*/params.json",
        "results/Qwen3-14B/ray_results/TorchTrainer_*/checkpoint_*/adapter_model.safetensors",
        "results/Qwen3-14B/final/adapter_model.safetensors",
        "tensorboard_logs/Qwen3-14B/*/events.*",
    ):
        assert list(home.glob(pattern)), pattern

    model = ('--base_model="Qwen/Qwen3-14B"', "--model_path=$MODEL_PATH")
    samples = ("--max_samples=2", "--batch_size=2", "--max_tokens=4", "--metrics=rougeL,chrf")
    status, log = storage.run(example("test_checkpoint", (*model, *samples)), "sft")
    assert status == "SUCCEEDED", log
    assert list(run.path.glob("evaluation/*/report.html"))

    status, log = storage.run(example("convert_checkpoint_to_hf", model), "sft")
    assert status == "SUCCEEDED", log
    assert (run.export_path / "model.safetensors").exists()
    logs = {"fine_tune.log", "test_checkpoint.log", "convert_checkpoint_to_hf.log"}
    assert {path.name for path in (home / "logs").iterdir()} == logs


def test_a_failed_training_fails_the_job_though_its_output_is_piped(storage: Storage) -> None:
    flags = (*TRAINING, "--dataset_name=/fsx/nothing.jsonl")
    status, log = storage.run(example("fine_tune", flags), "failing")
    assert status == "FAILED", log
    assert "error: no such file or folder: `/fsx/nothing.jsonl`" in log
    home = storage.home("failing")
    assert "error: no such file" in (home / "logs" / "fine_tune.log").read_text()
    assert (home / "post_script").exists()


def test_a_run_config_trains_on_all_nodes_and_survives_the_loss_of_one(storage: Storage) -> None:
    values: Values = {
        "ray": {"runtime_env_yaml": {"env_vars": {"GIVEN": "by the job"}}},
        "resources": {"nnodes": 2, "requests": NODE, "limits": NODE},
        "pre_script": ["export EXPORTED='by pre_script'"],
        "run": {
            "model_path": "/fsx/larger",
            "dataset_name": "/fsx/rows.jsonl",
            "max_steps": 24,
            "save_steps": 4,
            "eval_steps": 12,
            "max_seq_length": 128,
            "num_workers": 2,
            "logging_steps": 1,
            "num_proc": 1,
        },
    }
    with storage.cluster(values, "run") as cluster:
        cluster.submit()
        run = wait_until(cluster, lambda: next(iter(find_runs(storage.home("run"))), None))
        wait_until(cluster, run.latest_checkpoint)
        environs = [process.environ() for pod in cluster.workers for process in training_processes(pod)]
        assert len(environs) == 2
        assert all((e["GIVEN"], e["EXPORTED"]) == ("by the job", "by pre_script") for e in environs)
        cluster.kill_worker(0)
        cluster.add_worker()
        status = cluster.wait()
        assert status == "SUCCEEDED", cluster.logs()
    starts = events(run, "start")
    assert len(starts) == 2
    assert starts[1]["step"] >= 4
    assert sorted(losses(run)) == list(range(1, 25))
    assert run.final_path.exists()


def test_an_elastic_training_waits_for_the_workers_that_it_asks_for(storage: Storage) -> None:
    flags = (*TRAINING, "--num_workers=2")
    values = example("fine_tune", flags, elastic={"min_nodes": 1, "max_nodes": 2})
    with storage.cluster(values, "elastic") as cluster:
        cluster.submit()
        wait_until(cluster, lambda: "1 of the 2 workers wait for nodes" in cluster.logs())
        cluster.add_worker()
        assert cluster.wait() == "SUCCEEDED", cluster.logs()
    (run,) = find_runs(storage.home("elastic"))
    assert run.read_params()["global_batch"]["microbatches"] == 2 * 4


def wait_until(cluster: StagedCluster, found: Callable[[], Any]) -> Any:
    """Return what is found, as soon as it is, while the job runs."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (result := found()):
        assert cluster.status()["jobDeploymentStatus"] == "Running", cluster.logs()
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.2)
    return result


def training_processes(pod: Pod) -> list[psutil.Process]:
    """Return the pod's Ray workers that train."""
    processes = psutil.Process(pod.process.pid).children(recursive=True)
    return [process for process in processes if "RayTrainWorker" in " ".join(process.cmdline())]
