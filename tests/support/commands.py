"""Real `tunesmith` processes, and their Ray workers, to be watched and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tunesmith.config import TrainConfig
from tunesmith.runs.folder import RunDir
from tunesmith.runs.identity import locate_run
from tunesmith.runs.metrics_log import iterate_metrics

TIMEOUT_S = 240


def write_yaml(config: TrainConfig, path: Path) -> Path:
    """Write the settings that were given, as a user would."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return path


class Command:
    """A running `tunesmith train`."""

    def __init__(self, config: TrainConfig, *flags: str, **environment: str) -> None:
        self.run: RunDir = locate_run(config)
        folder = config.home
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        self._output = (folder / "output.txt").open("a+")
        path = write_yaml(config, folder / "run.yaml")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith", "train", str(path), *flags],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def wait(self) -> int:
        """Return the exit code; kill what hangs."""
        try:
            return self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {TIMEOUT_S} s:\n{self.output()}") from None

    def wait_until(self, happened: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not happened():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"no {what} after {TIMEOUT_S} s:\n{self.output()}"
            time.sleep(0.02)

    def wait_for_step(self, step: int, attempt: int) -> None:
        """Return when this attempt has trained that step."""
        lines = lambda: iterate_metrics(self.run.metrics_path)  # noqa: E731
        reached = lambda: any(line["step"] >= step and line["attempt"] >= attempt for line in lines())  # noqa: E731
        self.wait_until(reached, f"step {step} of attempt {attempt}")

    def kill_a_worker(self, number: int) -> None:
        """SIGKILL one of the training processes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        workers = sorted(
            child.pid for child in children if "RayTrainWorker" in " ".join(_command_line(child))
        )
        assert workers, f"no training process among {[_command_line(child)[:1] for child in children]}"
        os.kill(workers[number % len(workers)], signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL the driver, as the kernel or a lost machine would."""
        self.process.kill()
        self.process.wait()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def output(self) -> str:
        self._output.seek(0)
        return self._output.read()


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def run_python(code: str, *arguments: Path | str, cwd: Path | None = None, **environ: str) -> Any:
    """Return what the code prints, as JSON."""
    path = os.pathsep.join(sys.path)
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environ},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])
