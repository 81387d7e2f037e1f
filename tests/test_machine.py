"""What a process may use: a container's limits count."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import psutil
import pytest

from tunesmith import machine


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    return tmp_path


def test_without_a_limit_everything_may_be_used(cgroup: Path) -> None:
    (cgroup / "cpu.max").write_text("max 100000\n")
    (cgroup / "memory.max").write_text("max\n")
    assert machine.usable_cpus() >= 1
    assert machine.available_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def test_a_containers_limits_count(cgroup: Path) -> None:
    (cgroup / "cpu.max").write_text("150000 100000\n")
    (cgroup / "memory.max").write_text(f"{64 << 20}\n")
    (cgroup / "memory.current").write_text(f"{40 << 20}\n")
    (cgroup / "memory.stat").write_text(f"anon {10 << 20}\nfile {30 << 20}\ninactive_file {20 << 20}\n")
    assert machine.usable_cpus() == 1
    assert machine.available_memory() == 44 << 20


def test_sockets_lie_in_a_folder_whose_path_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, expected in (("/tmp/s", Path("/tmp/s")), ("/tmp/" + "t" * 80, Path("/tmp"))):
        monkeypatch.setattr(tempfile, "tempdir", folder)
        assert machine.socket_folder() == str(expected)
        assert len(f"{machine.socket_folder()}/{uuid.uuid4()}") <= 107
