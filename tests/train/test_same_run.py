"""The same files and templates, spelt otherwise, are the same run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.runs import small_config, start, write_rows
from tunesmith.api import fine_tune
from tunesmith.config import TrainConfig
from tunesmith.errors import RunError
from tunesmith.runs.identity import default_run_name, locate_run
from tunesmith.runs.lease import Lease
from tunesmith.train.same_run import find_run
from tunesmith.train.start import check_resumable


@pytest.fixture
def place(model_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a model and rows in it."""
    here = tmp_path / "here"
    here.mkdir()
    shutil.copytree(model_of("llama"), here / "plain")
    write_rows(here / "rows.jsonl")
    monkeypatch.chdir(here)
    return here


def given(**changes: Any) -> TrainConfig:
    settings = {"model_path": Path("plain"), "home": Path("home"), "run_name": None, **changes}
    return small_config(settings.pop("model_path"), Path("rows.jsonl"), settings.pop("home"), **settings)


SPELT: list[dict[str, Any]] = [
    {"dataset_name": "./rows.jsonl"},
    {"dataset_name": "../here/rows.jsonl"},
    {"dataset_name": "HERE/rows.jsonl"},
    {"model_path": "../here/plain"},
    {"model_path": "HERE/plain"},
    {"input_template": "{question} ", "field_mapping": {"output": "answer"}},
    {"input_template": "{q} ", "output_template": "{a}", "field_mapping": {"q": "question", "a": "answer"}},
    {"dataset_name": "./rows.jsonl", "model_path": "./plain/", "field_mapping": {"instruction": "question", "output": "answer", "unused": "x"}},
]  # fmt: skip


def at(place: Path, changes: dict[str, Any]) -> dict[str, Any]:
    return {k: v.replace("HERE", str(place)) if isinstance(v, str) else v for k, v in changes.items()}


def test_every_spelling_means_the_run_that_was_begun(place: Path) -> None:
    begun = start(given()).run
    for changes in SPELT:
        config = given(**at(place, changes))
        assert find_run(config) == begun, changes
        check_resumable(begun, config)
    assert find_run(given()) == begun


def test_a_run_goes_on_by_each_spelling_and_by_the_first_again(place: Path) -> None:
    tokens = start(given()).prepared_path
    for changes in [*SPELT, {}]:
        config = given(**at(place, changes))
        named = config.model_copy(update={"run_name": find_run(config).run_name})
        assert start(named).prepared_path == tokens
        assert find_run(config).run_name == default_run_name(given())


def test_a_run_in_a_home_of_its_own_is_found_too(place: Path) -> None:
    begun = start(given(home=None)).run
    assert begun.home == place / "runs" / begun.run_name
    assert find_run(given(home=None, dataset_name="./rows.jsonl")) == begun


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset_name": "copy.jsonl"},
        {"dataset_name": "./rows.jsonl", "learning_rate": 0.5},
        {"dataset_name": "./rows.jsonl", "run_name": "mine"},
        {"field_mapping": {"instruction": "answer", "output": "answer"}},
        {"input_template": "{question}", "field_mapping": {"output": "answer"}},
        {"model_path": "other/plain"},
    ],
)
def test_other_settings_mean_a_run_of_their_own(place: Path, changes: dict[str, Any]) -> None:
    begun = start(given()).run
    shutil.copy("rows.jsonl", "copy.jsonl")
    shutil.copytree("plain", "other/plain")
    config = given(**changes)
    assert find_run(config) == locate_run(config) != begun


def test_the_old_name_comes_first(place: Path) -> None:
    config = given(dataset_name="./rows.jsonl")
    begun, other = start(config).run, start(given()).run
    assert begun != other
    assert (find_run(config), find_run(given())) == (begun, other)


def test_the_command_goes_on_with_it(place: Path) -> None:
    begun = start(given()).run
    with Lease(begun.lease_path), pytest.raises(RunError, match="--run_name") as caught:
        fine_tune(given(dataset_name="./rows.jsonl"))
    assert str(begun.path) in caught.value.message


def test_a_torn_run_beside_it_is_no_matter(place: Path) -> None:
    begun = start(given()).run
    torn = begun.path.with_name(begun.path.name[:-8] + "0123abcd")
    torn.mkdir()
    (torn / "params.json").write_text("{")
    assert find_run(given(dataset_name="./rows.jsonl")) == begun
    begun.params_path.write_text("{}")
    assert find_run(given(dataset_name="./rows.jsonl")) != begun


def test_under_one_name_the_content_counts(place: Path) -> None:
    run = start(given(run_name="run")).run
    Path("away").mkdir()
    shutil.move("rows.jsonl", "away/sums.jsonl")
    shutil.move("plain", "away/plain")
    config = given(run_name="run", dataset_name="away/sums.jsonl", model_path="away/plain")
    check_resumable(run, config)

    write_rows(Path("others.jsonl"), seed=1)
    with pytest.raises(RunError, match=r"`dataset_name` \('rows.jsonl' → 'others.jsonl'\)"):
        check_resumable(run, config.model_copy(update={"dataset_name": "others.jsonl"}))
    shutil.copytree("away/plain", "other/plain")
    settings = json.loads(Path("other/plain/config.json").read_text())
    Path("other/plain/config.json").write_text(json.dumps({**settings, "rope_theta": 7.0}))
    with pytest.raises(RunError, match="`model_path`"):
        check_resumable(run, config.model_copy(update={"model_path": Path("other/plain")}))
    with pytest.raises(RunError, match="`input_template`"):
        check_resumable(run, config.model_copy(update={"input_template": "{instruction}"}))


def test_several_data_sets_are_compared_one_by_one(place: Path) -> None:
    write_rows(Path("more.jsonl"), seed=1)
    shared = {"input_template": "{question} ", "output_template": "{answer}"}

    def both(first: dict[str, Any], second: dict[str, Any]) -> TrainConfig:
        alone = {"dataset_name", "input_template", "output_template", "field_mapping"}
        settings = {k: getattr(given(), k) for k in given().model_fields_set - alone}
        return TrainConfig(**settings, datasets=[{**shared, **first}, {**shared, **second}])

    rows, more = {"dataset_name": "rows.jsonl"}, {"dataset_name": "more.jsonl"}
    begun = start(both(rows, more)).run
    spelt = both(
        {"dataset_name": "./rows.jsonl"},
        {**more, "input_template": "{q} ", "field_mapping": {"q": "question"}},
    )
    assert find_run(spelt) == begun
    check_resumable(begun, spelt)
    swapped = both(more, rows)
    assert find_run(swapped) != begun
    with pytest.raises(RunError, match="`datasets`"):
        check_resumable(begun, swapped)
    with pytest.raises(RunError, match="`datasets`"):
        check_resumable(begun, both(rows, {**more, "train_split_ratio": 0.5}))


def test_sets_of_ones_own_and_chat_templates_may_be_spelt_otherwise_too(place: Path) -> None:
    shutil.copy(place / "rows.jsonl", place / "held.jsonl")
    (place / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    shutil.copy(place / "plain.jinja", place / "copy.jinja")
    changes = {"validation_dataset": "held.jsonl", "chat_template": "plain.jinja"}
    begun = start(given(**changes)).run
    config = given(validation_dataset="./held.jsonl", chat_template="copy.jinja")
    assert find_run(config) == begun
    check_resumable(begun, config)
    (place / "copy.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    assert find_run(config) != begun
