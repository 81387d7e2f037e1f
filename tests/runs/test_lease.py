"""One live driver per run folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import RunError
from tunesmith.runs import lease as lease_module
from tunesmith.runs.lease import Lease, holds

HOLD = """
import sys, time
from pathlib import Path
from tunesmith.runs.lease import Lease
with Lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "lease.json"


def hold_elsewhere(path: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_lease_is_given_back(path: Path) -> None:
    with Lease(path) as lease:
        assert holds(path, lease.token)
    assert not path.exists()
    with Lease(path):
        pass


def test_a_second_driver_is_refused_with_the_holders_host_and_age(path: Path) -> None:
    holder = hold_elsewhere(path)
    try:
        with (
            pytest.raises(RunError, match=rf"held by process {holder.pid} on host \S+, started \d+ min ago"),
            Lease(path),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_holder_on_this_host_is_replaced_at_once(path: Path) -> None:
    holder = hold_elsewhere(path)
    holder.kill()
    # Not reaped yet: a zombie holds nothing.
    time.sleep(0.1)
    with Lease(path) as lease:
        assert holds(path, lease.token)
    holder.wait()


def test_a_process_that_took_over_the_holders_number_is_not_the_holder(path: Path) -> None:
    with Lease(path):
        edit(path, process_start="1")
        with Lease(path) as second:
            assert holds(path, second.token)


def test_a_holder_elsewhere_is_replaced_when_its_lease_has_run_out(path: Path) -> None:
    with Lease(path):
        edit(path, host="elsewhere")
        with pytest.raises(RunError, match="on host elsewhere"), Lease(path):
            pass
        edit(path, renewed_at=time.time() - lease_module.EXPIRE_S - 1)
        with Lease(path) as second:
            assert holds(path, second.token)


def test_a_holder_renews(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.05)
    with Lease(path):
        before = json.loads(path.read_text())["renewed_at"]
        time.sleep(0.5)
        assert json.loads(path.read_text())["renewed_at"] > before


def test_a_replaced_holder_leaves_the_new_lease_alone(path: Path) -> None:
    with Lease(path):
        edit(path, token="another")
    assert json.loads(path.read_text())["token"] == "another"


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_holder_survives_a_disk_that_fails_for_a_moment(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.05)
    failures = []

    def fail(path: Path) -> None:
        failures.append(path)
        raise OSError("stale file handle")

    with Lease(path) as lease:
        before = json.loads(path.read_text())["renewed_at"]
        with monkeypatch.context() as disk:
            disk.setattr(lease_module, "read_holder", fail)
            wait_until(lambda: len(failures) > 2)
        wait_until(lambda: json.loads(path.read_text())["renewed_at"] > before)
        assert not lease.is_lost


def test_a_holder_that_was_replaced_knows_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.05)
    with Lease(path) as lease:
        edit(path, token="another")
        wait_until(lambda: lease.is_lost)


def test_a_holder_in_another_container_of_the_same_host_name_is_alive(path: Path) -> None:
    with Lease(path):
        edit(path, processes="another namespace", pid=1, process_start="1")
        with pytest.raises(RunError, match="held by process 1 "), Lease(path):
            pass
