"""Paths that a person may give and nobody can follow: one clear error each, of every setting that takes one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tunesmith.cli import main
from tunesmith.config import TrainConfig
from tunesmith.data.hub import is_saved_dataset
from tunesmith.data.sources import local_path
from tunesmith.errors import ConfigError
from tunesmith.model.chat_template import read_if_file
from tunesmith.model.load import check_model_path
from tunesmith.paths import exists
from tunesmith.view.inspect_page import check_page_path

NOBODY = 65534


@contextmanager
def as_another_user(folder: Path) -> Iterator[None]:
    """Let nobody enter the folder: it is shut, and root, whom that doesn't stop, becomes another user for a while."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0o600)
    try:
        if user == 0:
            os.seteuid(NOBODY)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


@pytest.mark.parametrize(
    "look",
    [
        lambda folder: exists(folder / "rows.jsonl"),
        lambda folder: local_path(TrainConfig(dataset_name=str(folder / "rows.jsonl"))),
        lambda folder: local_path(TrainConfig(dataset_name=str(folder / "absent.jsonl"))),
        is_saved_dataset,
        lambda folder: read_if_file(str(folder / "rows.jsonl")),
        lambda folder: check_page_path(folder / "inner" / "page.html"),
        lambda folder: check_model_path(TrainConfig(model_path=folder / "inner").model),
    ],
)
def test_what_may_not_be_looked_at_is_refused_clearly(look: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "inner").mkdir()
    with as_another_user(tmp_path), pytest.raises(ConfigError, match="permission denied"):
        look(tmp_path)


@pytest.mark.parametrize("setting", ["dataset_name", "model_path", "home", "chat_template", "html"])
def test_the_home_of_an_unknown_user_is_named(
    setting: str, tmp_path: Path, model_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "x"}\n')
    given = {"dataset_name": str(rows), "model_path": str(model_of("llama"))}
    given[setting] = "~no_such_user/x.html"
    assert main(["inspect", *(word for name, text in given.items() for word in (f"--{name}", text))]) == 2
    assert "no such user's home folder" in capsys.readouterr().err


def test_a_name_too_long_for_a_file_is_no_file() -> None:
    name = "x" * 300
    assert local_path(TrainConfig(dataset_name=name)) is None
    assert read_if_file(name) == name
    assert not exists(Path(name))
