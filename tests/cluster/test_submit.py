"""`tunesmith submit`: a release of Helm's, or a job of a Ray cluster; what it says, and its exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.helm import helm, read_manifests
from support.paths import REPOSITORY
from support.runs import events, losses, small_config, write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.config.layers import dump_yaml
from tunesmith.config.yaml_file import write_yaml
from tunesmith.runs.folder import RunDir
from tunesmith.runs.identity import locate_run

SETTINGS = {"hf_model_id": "Qwen/Qwen3-8B", "dataset_name": "/fsx/rows.jsonl"}
TIMEOUT_S = 300

# Helm with a cluster that takes everything.
TAKING = """#!/bin/sh
case $1 in install) set -- "$@" --dry-run=client ;; esac
exec {helm} "$@"
"""
# Helm with a cluster that refuses, as one does that has the release already.
REFUSING = """#!/bin/sh
case $1 in install) echo 'Error: INSTALLATION FAILED: {said}' >&2; exit 1 ;; esac
exec {helm} "$@"
"""
IN_USE = "cannot reuse a name that is still in use"
NO_KIND = 'resource mapping not found: no matches for kind "RayJob" in version "ray.io/v1"'
NO_NAMESPACE = 'create: failed to create: namespaces "team" not found'


def run_submit(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `tunesmith submit` in a folder, whose `bin` comes first on the PATH."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TUNESMITH_"))}
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "-m", "tunesmith", "submit", *words],
        cwd=folder,
        env={**known, "PYTHONPATH": str(REPOSITORY / "src"), "PATH": path, **environ},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def write_helm(folder: Path, script: str, said: str = IN_USE) -> None:
    """Put a `helm` on the PATH of `run_submit`; `said` is why its cluster refuses."""
    path = folder / "bin" / "helm"
    path.parent.mkdir()
    path.write_text(script.format(helm=helm(), said=said))
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_run.yaml").write_text(write_yaml(SETTINGS))
    return tmp_path


def test_submit_installs_what_render_prints_and_says_how_to_follow_it(folder: Path) -> None:
    write_helm(folder, TAKING)
    done = run_submit(folder, "my_run.yaml", "-n", "team", "--set", "image=a/b:1", "--lora_rank=8")
    assert done.returncode == 0, done.stderr
    manifest, _, notes = done.stdout.partition("MANIFEST:\n")[2].partition("NOTES:\n")
    environ = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY / "src"),
    }
    rendered = subprocess.run(
        [
            sys.executable,
            "-m",
            "tunesmith",
            "render",
            "my_run.yaml",
            "-n",
            "team",
            "--set=image=a/b:1",
            "--lora_rank=8",
        ],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert read_manifests(manifest) == read_manifests(rendered.stdout)
    assert "kubectl logs -n team -f job/rayjob-my-run" in notes
    assert "helm uninstall -n team my-run" in notes


def test_a_release_that_exists_is_an_error_that_says_how_to_go_on(folder: Path) -> None:
    assert IN_USE.encode() in Path(helm()).read_bytes()
    write_helm(folder, REFUSING)
    done = run_submit(folder, "my_run.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: there is a release `my-run` already" in done.stderr
    assert "`helm uninstall my-run`" in done.stderr
    assert "resumes" in done.stderr


def test_the_release_that_exists_is_named_with_its_namespace(folder: Path) -> None:
    write_helm(folder, REFUSING)
    done = run_submit(folder, "my_run.yaml", "--namespace", "team")
    assert "`helm uninstall -n team my-run`" in done.stderr


@pytest.mark.parametrize(
    ("said", "remedy"),
    [(NO_KIND, "install KubeRay's operator"), (NO_NAMESPACE, "`kubectl create namespace team`")],
)
def test_what_the_cluster_lacks_comes_with_its_remedy(said: str, remedy: str, folder: Path) -> None:
    write_helm(folder, REFUSING, said)
    done = run_submit(folder, "my_run.yaml", "-n", "team")
    assert (done.returncode, done.stdout) == (1, "")
    assert remedy in done.stderr


def test_a_cluster_out_of_reach_is_a_failure_at_work(folder: Path) -> None:
    write_helm(folder, '#!/bin/sh\nexec {helm} "$@"\n')
    kubeconfig = {
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": ""}}],
        "current-context": "c",
    }
    (folder / "kubeconfig").write_text(json.dumps(kubeconfig))
    done = run_submit(folder, "my_run.yaml", KUBECONFIG=str(folder / "kubeconfig"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "helm can't install `my-run`" in done.stderr
    assert "127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_values_that_cannot_work_never_reach_the_cluster(folder: Path) -> None:
    write_helm(folder, REFUSING)
    done = run_submit(folder, "my_run.yaml", "--set", "resources.nnodes=0")
    assert done.returncode == 2
    assert "at '/resources/nnodes'" in done.stderr


@pytest.mark.parametrize(
    ("words", "environ", "said"),
    [
        (["--wait"], {}, "`--wait` is for Ray jobs"),
        ([], {"RAY_ADDRESS": "http://127.0.0.1:1"}, "the run has no `home`"),
        (["--home=/a"], {"RAY_ADDRESS": "http://127.0.0.1:1"}, "no Ray cluster answers at `RAY_ADDRESS` (http://127.0"),
        (["--home=/a"], {"RAY_ADDRESS": "ray://127.0.0.1:1"}, "no Ray cluster answers at `RAY_ADDRESS` (ray://127.0"),
        (["--home=/a"], {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}, "no Ray cluster answers at `RAY_API_SERVER_ADDRESS`"),
        (["--home=/a", "-n", "team"], {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}, "a Ray job, as RAY_API_SERVER_ADDRESS is set"),
        (["--home=a"], {"RAY_ADDRESS": "http://127.0.0.1:1"}, "give absolute paths on a disk that all nodes mount: --home=/…"),
    ],
)  # fmt: skip
def test_what_cannot_be_submitted_is_refused(
    words: list[str], environ: dict[str, str], said: str, folder: Path
) -> None:
    done = run_submit(folder, "my_run.yaml", *words, **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@dataclass(frozen=True)
class Head:
    """A Ray head of one CPU, and a folder with the config of a run."""

    address: str
    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        return {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "of-these-tests-alone",
        }

    def submit(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return run_submit(self.folder, "my_run.yaml", *words, **self.environ, **environ)

    def ray_job(self, *words: str) -> str:
        """Return what `ray job` prints."""
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", *words],
            env={**os.environ, **self.environ},
            capture_output=True,
            text=True,
            check=True,
            timeout=TIMEOUT_S,
        )
        return done.stdout


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running_head(folder: Path) -> Iterator[Head]:
    """Run a Ray head, on ports that nothing else uses; write the config of a run of seconds."""
    model = save_model(folder / "tiny", build_tokenizer("byte_bpe"))
    config = small_config(model, write_rows(folder / "rows.jsonl"), folder / "home")
    (folder / "my_run.yaml").write_text(dump_yaml(config))
    names = (
        "port",
        "dashboard-port",
        "dashboard-agent-listen-port",
        "ray-client-server-port",
        "metrics-export-port",
    )
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    fixed = {"num-cpus": 1, "min-worker-port": 0, "max-worker-port": 0, "object-store-memory": 80_000_000}
    head = Head(f"http://127.0.0.1:{ports['dashboard-port']}", folder)
    environ = {
        **{name: value for name, value in {**os.environ, **head.environ}.items() if name != "RAY_ADDRESS"},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    options = [f"--{name}={value}" for name, value in {**ports, **fixed}.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: answers(ports["dashboard-port"]))
        yield head
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with running_head(tmp_path_factory.mktemp("submit")) as head:
        yield head


def wait_until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def settings_of(head: Head, **changes: Any) -> tuple[RunDir, list[str]]:
    """Return the run that the changed config makes, and the flags that change it so."""
    config = small_config(head.folder / "tiny", head.folder / "rows.jsonl", head.folder / "home", **changes)
    return locate_run(config), [f"--{name}={value}" for name, value in changes.items()]


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_job_runs_the_code_and_the_config_that_were_submitted(head: Head, tmp_path: Path) -> None:
    shutil.copytree(
        REPOSITORY / "src" / "tunesmith", tmp_path / "tunesmith", ignore=shutil.ignore_patterns("__pycache__")
    )
    source = tmp_path / "tunesmith" / "__init__.py"
    source.write_text(source.read_text().replace("__version__ = ", "__version__ = 'changed-' + "))
    run, flags = settings_of(head, run_name="whole", lora_rank=2)
    done = head.submit(*flags, "--wait", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ray job logs --follow whole-" in done.stdout
    assert "finished at step 4" in done.stdout
    assert done.stderr == "the job has succeeded\n"
    assert sorted(losses(run)) == [1, 2, 3, 4]
    assert (run.final_path / "adapter_model.safetensors").is_file()
    params = json.loads(run.params_path.read_text())
    assert params["versions"]["tunesmith"].startswith("changed-")
    assert params["settings"]["lora_rank"] == 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_job_that_fails_ends_with_its_exit_code(head: Head) -> None:
    done = head.submit(
        "--dataset_name=/nowhere/rows.jsonl", "--run_name=failing", "--wait", "-f", "cluster.yaml"
    )
    assert done.returncode == 2
    assert "error: no such file or folder: `/nowhere/rows.jsonl`" in done.stdout
    assert "what describes pods and their namespace isn't used" in done.stderr
    assert done.stderr.endswith("the job has failed\n")


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_job_is_left_alone_and_stopped_with_a_checkpoint(head: Head) -> None:
    run, flags = settings_of(head, run_name="long", max_steps=100_000, eval_steps=0, save_steps=0)
    done = head.submit(*flags, "--release=my-name")
    assert done.returncode == 0, done.stderr
    wait_until(lambda: run.metrics_path.exists() and losses(run))
    submission_id = done.stdout.split()[2]
    assert submission_id.startswith("my-name-")
    head.ray_job("stop", submission_id)
    assert len(events(run, "stopped")) == 1
    assert run.latest_checkpoint() is not None


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_wait_leaves_the_job_running(head: Head) -> None:
    run, flags = settings_of(head, run_name="waited-for")
    process, submission_id = start_waiting(head, *flags)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    logs = head.ray_job("logs", "--follow", submission_id)
    assert len(events(run, "finished")) == 1, logs


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_is_lost_ends_the_waiting_with_an_error(tmp_path: Path) -> None:
    with running_head(tmp_path) as head:
        process, _ = start_waiting(head)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "can't be followed any more" in err
    assert "Traceback" not in err


def start_waiting(head: Head, *flags: str) -> tuple[subprocess.Popen[str], str]:
    """Start `tunesmith submit --wait`; return it, and the job's id, when it prints the job's log."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "submit", "my_run.yaml", *flags, "--wait"],
        cwd=head.folder,
        env={**os.environ, **head.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    submission_id = process.stdout.readline().split()[2]
    assert any("Running entrypoint" in line for line in process.stdout)
    return process, submission_id
