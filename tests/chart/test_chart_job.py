"""What the job's scripts do, run by bash as the head's pod would: order, failures, exports, git."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.helm import CHART, Values, render_files

CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@dataclass(frozen=True)
class Ended:
    exit_code: int
    output: str
    home: Path


@pytest.fixture
def run_job(tmp_path: Path) -> Callable[..., Ended]:
    """`run_job(values)` runs the rendered job.sh in a home of its own; keywords are its environment."""

    def run(values: Values, **environ: str) -> Ended:
        process = start_job(values, tmp_path, **environ)
        output, _ = process.communicate(timeout=60)
        return Ended(process.returncode, output, tmp_path)

    return run


def start_job(values: Values, folder: Path, **environ: str) -> subprocess.Popen[str]:
    parts = folder / "etc"
    parts.mkdir()
    for name, text in render_files(values).items():
        (parts / name).write_text(text)
    return subprocess.Popen(
        ["sh", "-c", f"bash {parts}/job.sh"],
        cwd=folder,
        env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def training(*lines: str, **values: Any) -> Values:
    return {"train": {"command": list(lines)}, "post_script": ["echo post"], **values}


def test_parts_run_in_order_and_share_variables_and_folder(run_job: Callable[..., Ended]) -> None:
    ended = run_job(
        {
            "inline_script": "A=1\nmkdir -p deep",
            "pre_script": ["B=$((A + 1))", "cd deep"],
            "train": {
                "command": ["echo"],
                "args": ["$A $B", '--x="a  b"', 1000000, "$(basename $PWD)", "2>&1 | tee $HOME/log"],
            },
            "post_script": ["echo post $B in $(basename $PWD)"],
        }
    )
    assert (ended.exit_code, ended.output) == (0, "1 2 --x=a  b 1000000 deep\npost 2 in deep\n")
    assert (ended.home / "log").read_text() == "1 2 --x=a  b 1000000 deep\n"


@pytest.mark.parametrize(
    "after",
    ["", "2>&1 | tee log", "2>&1 | tee log && echo done", "; echo done", "| cat\necho done", "# a comment"],
)
def test_a_failed_training_fails_the_job_whatever_follows_it(
    run_job: Callable[..., Ended], after: str
) -> None:
    ended = run_job(training("bash", "-c", "'echo out; exit 3'", after))
    assert (ended.exit_code, ended.output) == (3, "out\npost\n")


@pytest.mark.parametrize(
    "line",
    [
        "false",
        "exit 7",
        "cd nowhere",
        "false | true",
        "if",
        "unset -v HOME; cat nothing",
        "export A=$(false); false",
    ],
)
def test_a_failure_before_the_training_fails_the_job(run_job: Callable[..., Ended], line: str) -> None:
    ended = run_job(training("echo trained", pre_script=["true", line, "true"]))
    assert ended.exit_code != 0
    assert "trained" not in ended.output
    assert ended.output.endswith("post\n")


@pytest.mark.parametrize(
    "line", ["set +e", "set +o pipefail", "trap 'exit 0' EXIT", "trap '' TERM", "unset_is_fine=$NOWHERE"]
)
def test_nothing_in_pre_script_hides_a_failed_training(run_job: Callable[..., Ended], line: str) -> None:
    ended = run_job(training("(exit 5) | cat", pre_script=[line]))
    assert ended.exit_code == 5
    assert ended.output.endswith("post\n")


@pytest.mark.parametrize(("line", "code"), [("exit 0", 4), ("false", 4), ("if", 4), ("kill -9 $BASHPID", 4)])
def test_post_script_decides_nothing(run_job: Callable[..., Ended], line: str, code: int) -> None:
    assert run_job({"train": {"command": "exit 4"}, "post_script": line}).exit_code == code


def test_a_failing_post_script_is_told_and_the_training_counts(run_job: Callable[..., Ended]) -> None:
    ended = run_job({"train": {"command": "echo trained"}, "post_script": ["exit 9"]})
    assert ended.exit_code == 0
    assert "post_script ended with exit code 9" in ended.output


def test_exports_of_the_scripts_join_the_jobs_runtime_environment(run_job: Callable[..., Ended]) -> None:
    config = {"runtime_env": {"pip": ["a"], "env_vars": {"OLD": "1", "B": "0"}}, "metadata": {"job": "x"}}
    ended = run_job(
        {
            "inline_script": ["export A='one two'"],
            "pre_script": [
                "export B=2 GIVEN=changed LINES_2=$'a\\nb'",
                "NOT_EXPORTED=3",
                "f() { :; }; export -f f",
                "export ODD='a$HOME'",
                "cd /",
            ],
            "train": {"command": f"printenv {CONFIG}"},
        },
        **{CONFIG: json.dumps(config), "GIVEN": "first", "SAME": "same"},
    )
    *warnings, printed = ended.output.splitlines()
    assert json.loads(printed) == {
        "runtime_env": {
            "pip": ["a"],
            "env_vars": {"OLD": "1", "A": "one two", "B": "2", "GIVEN": "changed", "LINES_2": "a\nb"},
        },
        "metadata": {"job": "x"},
    }
    assert len(warnings) == 1 and "ODD" in warnings[0]


def test_ray_reads_the_exports_as_the_jobs_own(run_job: Callable[..., Ended]) -> None:
    from ray._private.worker import _merge_runtime_env
    from ray.job_config import JobConfig

    ended = run_job({"pre_script": "export A=1", "train": {"command": f"printenv {CONFIG}"}})
    config = JobConfig.from_json(json.loads(ended.output))
    assert _merge_runtime_env(config.runtime_env, {"env_vars": {"B": "2"}}) == {
        "env_vars": {"A": "1", "B": "2"}
    }


@pytest.fixture
def repository(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A git repository whose file says which commit it is of, and the ids of its commits."""
    folder = tmp_path_factory.mktemp("repository")
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
    commits = {"url": str(folder)}
    for name in ("first", "second", "third"):
        if name == "third":
            subprocess.run([*git, "checkout", "-q", "-b", "side"], check=True)
        (folder / "version").write_text(name)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", name], check=True)
        done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        commits[name] = done.stdout.strip()
    subprocess.run([*git, "checkout", "-q", "main"], check=True)
    return commits


@pytest.mark.parametrize(
    ("branch", "commit", "found"),
    [(None, None, "second"), ("side", None, "third"), ("main", "first", "first"), (None, "third", "third")],
)
def test_the_job_starts_in_a_clone_that_goes_in_the_end(
    run_job: Callable[..., Ended],
    repository: dict[str, str],
    branch: str | None,
    commit: str | None,
    found: str,
) -> None:
    git = {"repo_url": repository["url"], "branch": branch, "commit": commit and repository[commit][:12]}
    ended = run_job(
        {"git": git, "train": {"command": "cat version && pwd > $HOME/where"}, "post_script": "cat version"}
    )
    assert ended.exit_code == 0, ended.output
    assert ended.output.endswith(found * 2)
    where = Path((ended.home / "where").read_text().strip())
    assert where.parent == ended.home / "tmp"
    assert not where.exists()


@pytest.mark.parametrize(
    "git", [{"repo_url": "nowhere"}, {"repo_url": "--upload-pack=touch x"}, {"repo_url": "$(touch x)'\""}]
)
def test_a_clone_that_fails_fails_the_job(run_job: Callable[..., Ended], git: Values) -> None:
    ended = run_job(training("echo trained", git=git))
    assert ended.exit_code != 0
    assert "trained" not in ended.output
    assert not (ended.home / "x").exists()


@pytest.mark.parametrize("after", ["", "2>&1 | tee $HOME/log"])
def test_a_stopped_job_lets_the_training_save_and_runs_post_script(tmp_path: Path, after: str) -> None:
    save = "import signal, time; signal.signal(15, lambda *_: (time.sleep(0.5), print('saved'), exit(6))); print('up', flush=True); time.sleep(30)"  # fmt: skip
    process = start_job(training("python", "-c", f'"{save}"', after), tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    # As Ray does: the entrypoint's shell and everything below it.
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stdout.read() == "saved\npost\n"
    process.wait(10)


def test_tee_leaves_in_its_file_what_the_training_itself_logs_there(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("an attempt before\n")
    lines = "echo printed; echo logged >> $HOME/log; echo printed; exit 3"
    process = start_job(training("bash", "-c", f"'{lines}'", "2>&1 | tee $HOME/log"), tmp_path)
    assert process.communicate(timeout=60)[0] == "printed\nprinted\npost\n"
    assert process.returncode == 3
    logged = (tmp_path / "log").read_text().splitlines()
    assert sorted(logged) == ["an attempt before", "logged", "printed", "printed"]


@pytest.mark.parametrize("is_up", [True, False])
def test_a_worker_that_has_to_go_tells_ray_and_waits_for_it(tmp_path: Path, is_up: bool) -> None:
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    ray.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        if not is_up:
            head.close()
        started = time.monotonic()
        environ = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "FQ_RAY_IP": "127.0.0.1",
            "RAY_PORT": str(port),
        }
        subprocess.run(["bash", CHART / "files" / "drain.sh", "19"], env=environ, check=False)
    assert (time.monotonic() - started > 1.9) == is_up
    assert "--deadline-remaining-seconds=4" in (tmp_path / "said").read_text()
