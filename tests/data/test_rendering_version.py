"""A version that renders rows otherwise prepares them anew, and leaves a run that goes on its own tokens."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.runs import small_config, start
from tunesmith.config import TrainConfig
from tunesmith.data import prepare
from tunesmith.errors import DataError
from tunesmith.model.load import load_tokenizer


@pytest.fixture
def config(model_of: Callable[[str], Path], rows: Path, tmp_path: Path) -> TrainConfig:
    return small_config(model_of("llama"), rows, tmp_path / "home")


def test_a_run_keeps_the_tokens_that_it_began_with(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "RENDERING_VERSION", 1)
    begun = start(config)
    recorded = begun.run.read_params()["data"]
    assert "rendering_version" not in recorded
    monkeypatch.setattr(prepare, "RENDERING_VERSION", 2)
    assert start(config).prepared_path == begun.prepared_path
    assert begun.run.read_params()["data"] == recorded
    other = start(config.model_copy(update={"run_name": "other"}))
    assert other.prepared_path.name != begun.prepared_path.name
    assert other.run.read_params()["data"]["rendering_version"] == 2
    assert prepare.open_prepared(other.prepared_path).rendering_version == 2

    (tmp_path / "home").rename(tmp_path / "moved")
    moved = config.model_copy(update={"home": tmp_path / "moved"})
    assert start(moved).prepared_path.is_relative_to(tmp_path / "moved")
    assert moved.home is not None
    shutil.rmtree(moved.home / "datasets" / begun.prepared_path.parent.name)
    with pytest.raises(DataError, match="are gone, and this version would render") as caught:
        start(moved)
    assert "--run_name" in str(caught.value.hint)


def test_the_tokens_of_a_version_that_is_newer_are_kept_too(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "RENDERING_VERSION", 9)
    begun = start(config)
    monkeypatch.undo()
    assert start(config).prepared_path == begun.prepared_path


def test_a_run_keeps_the_day_on_which_it_began(config: TrainConfig, tmp_path: Path) -> None:
    rows = tmp_path / "talks.jsonl"
    talk = [{"role": "user", "content": "Which day is it?"}, {"role": "assistant", "content": "Today."}]
    rows.write_text("".join(json.dumps({"messages": talk, "id": i}) + "\n" for i in range(9)))
    template = "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ ' ' + m.content }}{% endfor %}"
    config = TrainConfig(
        model_path=config.model_path,
        dataset_name=str(rows),
        chat_template=template,
        train_split_ratio=1.0,
        max_seq_length=64,
        num_proc=1,
        home=tmp_path / "home",
    )
    begun = start(config)
    params = begun.run.read_params()
    assert params["data"]["date"] == datetime.date.today().isoformat()

    params["data"]["date"] = "2001-02-03"
    begun.run.params_path.unlink()
    tokenizer = load_tokenizer(config.model, chat_template=template)
    prepared = prepare.prepare(config, tokenizer, begun.run.datasets_path, "2001-02-03")
    params["data"] |= {"fingerprint": prepared.fingerprint, "folder": str(prepared.folder)}
    begun.run.params_path.write_text(json.dumps(params))
    again = start(config)
    assert again.prepared_path == prepared.folder
    assert again.run.read_params()["data"]["date"] == "2001-02-03"
