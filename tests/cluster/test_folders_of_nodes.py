"""What a Ray of our own is told of folders: caches by their whole paths, and sockets in a short one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cluster.folders import choose_temp_dir, make_caches_absolute
from tunesmith.errors import ConfigError


def test_relative_caches_mean_the_same_in_processes_that_stand_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("HF_HOME", "./hf")
    monkeypatch.setenv("HF_HUB_CACHE", "~/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.delenv("TORCH_HOME", raising=False)

    make_caches_absolute()

    import os

    assert os.environ["HF_HOME"] == f"{tmp_path}/hf"
    assert os.environ["HF_HUB_CACHE"] == "/home/someone/hub"
    assert os.environ["XDG_CACHE_HOME"] == "/cache"
    assert "TORCH_HOME" not in os.environ


def test_a_short_folder_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/short")
    assert choose_temp_dir() is None
    monkeypatch.delenv("TMPDIR")
    assert choose_temp_dir() is None


def test_one_too_long_for_sockets_gives_way_and_a_chosen_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", f"/tmp/{'t' * 60}")
    assert choose_temp_dir() == "/tmp/ray"

    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{'t' * 60}")
    with pytest.raises(ConfigError, match="`RAY_TMPDIR` is `/tmp/ttt") as raised:
        choose_temp_dir()
    assert raised.value.hint is not None
    most = int(raised.value.hint.split("at most ")[1].split()[0])
    monkeypatch.setenv("RAY_TMPDIR", "/" + "t" * (most - 1))
    assert choose_temp_dir() is None
    monkeypatch.setenv("RAY_TMPDIR", "/" + "t" * most)
    with pytest.raises(ConfigError):
        choose_temp_dir()
