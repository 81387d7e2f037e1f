"""Which run the settings mean, and which changed ones it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.config import TrainConfig, setting
from tunesmith.config.layers import dump_settings, settings_from_dump
from tunesmith.errors import RunError
from tunesmith.runs.identity import check_settings, check_unchanged, default_run_name, locate_run, scope_of

GIVEN = {"model_path": "tiny", "dataset_name": "rows.jsonl", "lora_rank": 4}


class NewerConfig(TrainConfig):
    """What a later version may add: a setting of each scope, one whose default follows another."""

    new_data: int = setting(0, "Anything.", group="data", scope="data")
    new_model: list[str] = setting(
        lambda data: [data["dataset_name"]], "Anything.", group="model", scope="model"
    )
    new_training: float = setting(0.5, "Anything.", group="training", scope="training")
    new_run: bool = setting(False, "Anything.", group="output", scope="run")


def test_every_setting_but_those_of_the_machine_names_the_run() -> None:
    names = {}
    for name, value in {"seed": 1, "learning_rate": 0.1, "packing": False, "dataset_revision": "v2"}.items():
        names[name] = default_run_name(TrainConfig(**GIVEN, **{name: value}))
    assert default_run_name(TrainConfig(**GIVEN, num_proc=1, max_steps=7)) == default_run_name(
        TrainConfig(**GIVEN)
    )
    assert len({*names.values(), default_run_name(TrainConfig(**GIVEN))}) == len(names) + 1


def test_a_newer_setting_names_the_run_only_where_it_isn_t_at_its_default() -> None:
    before = default_run_name(TrainConfig(**GIVEN))
    assert default_run_name(NewerConfig(**GIVEN)) == before
    assert (
        default_run_name(NewerConfig(**GIVEN, new_data=0, new_model=["rows.jsonl"], new_run=True)) == before
    )
    changes: list[dict[str, Any]] = [{"new_data": 1}, {"new_model": []}, {"new_training": 0.25}]
    names = [default_run_name(NewerConfig(**GIVEN, **change)) for change in changes]
    assert len({before, *names}) == 4


def test_a_setting_that_the_run_didn_t_record_counts_as_recorded_at_its_default(tmp_path: Path) -> None:
    config = TrainConfig(**GIVEN, home=tmp_path, run_name="run")
    run = locate_run(config)
    run.path.mkdir(parents=True)
    run.write_params({"settings": dump_settings(config), "given": sorted(config.model_fields_set)})
    newer = {"home": tmp_path, "run_name": "run", "new_training": 0.25, "new_run": True}
    check_settings(run, NewerConfig(**GIVEN, **newer))
    for change in ({"new_data": 1}, {"new_model": ["other"]}):
        with pytest.raises(RunError, match=f"other settings.*`{next(iter(change))}`"):
            check_settings(run, NewerConfig(**GIVEN, **newer, **change))


def test_recorded_settings_may_lack_newer_ones() -> None:
    config = TrainConfig(**GIVEN)
    read = settings_from_dump(NewerConfig, dump_settings(config), config.model_fields_set)
    assert read == NewerConfig(**GIVEN)
    assert read.model_fields_set == set(GIVEN)
    assert scope_of(read, "new_data") == "data"


def test_changed_data_sets_are_named_and_the_hub_only_where_one_is_of_it(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a.jsonl", "b, c.jsonl", "d.jsonl")]
    for name in names:
        Path(name).touch()
    a, comma, d = names

    def refused(what: str, name: str) -> str:
        with pytest.raises(RunError) as caught:
            check_unchanged(what, name, "old", "new")
        return str(caught.value)

    assert f"one of the data sets `{a}`, `{d}` has changed" in refused("data set", f"{a}, {d}")
    assert f"the data set `{comma}` has changed" in refused("data set", comma)
    assert "hub" not in refused("data set", f"{a}, {d}") + refused("data set", comma) + refused("model", a)
    mixed = refused("data set", f"{a}, some/rows")
    assert "--dataset_revision" in mixed and "--model_revision" not in mixed
    assert "(the hub's older commit: --model_revision)" in refused("model", "some/model")
    check_unchanged("model", "some/model", "same", "same")
