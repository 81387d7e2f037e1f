"""`$NAME` in a setting that may be a path is the environment's, wherever the setting is given."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tunesmith.chart.places import refuse_relative_paths
from tunesmith.config import ConvertConfig, EvaluateConfig, Settings, TrainConfig
from tunesmith.config.flags import parse_flags
from tunesmith.config.layers import dump_settings, dump_yaml, load_settings, settings_from_dump
from tunesmith.config.serve import ServeConfig
from tunesmith.errors import ConfigError
from tunesmith.paths import expand, expand_variables
from tunesmith.runs.identity import default_run_name

PLACES = [
    (TrainConfig, "home"),
    (TrainConfig, "model_path"),
    (TrainConfig, "hf_model_id"),
    (TrainConfig, "dataset_name"),
    (TrainConfig, "validation_dataset"),
    (TrainConfig, "test_dataset"),
    (TrainConfig, "data_dir"),
    (TrainConfig, "chat_template"),
    (TrainConfig, "adapter_path"),
    (EvaluateConfig, "checkpoints_dir"),
    (EvaluateConfig, "chat_template"),
    (EvaluateConfig, "base_model"),
    (EvaluateConfig, "model_path"),
    (EvaluateConfig, "home"),
    (EvaluateConfig, "test_dataset"),
    (EvaluateConfig, "bertscore_model"),
    (ConvertConfig, "output_dir"),
]


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path / "scratch"


def _load(model: type[Settings], way: str, name: str, text: str, tmp_path: Path) -> Any:
    if way == "flag":
        return load_settings(model, None, parse_flags(model, [f"--{name}={text}"]).values, {})
    if way == "variable":
        return load_settings(model, None, {}, {f"TUNESMITH_{name.upper()}": text})
    if way == "library":
        return model(**{name: text})
    (tmp_path / "run.yaml").write_text(f"{name}: {text}\n")
    return load_settings(model, tmp_path / "run.yaml", {}, {})


@pytest.mark.parametrize(("model", "name"), PLACES)
@pytest.mark.parametrize("way", ["flag", "variable", "yaml", "library"])
def test_it_is_expanded(model: type[Settings], name: str, way: str, scratch: Path, tmp_path: Path) -> None:
    for text in ("$SCRATCH/it", "${SCRATCH}/it"):
        assert str(getattr(_load(model, way, name, text, tmp_path), name)) == f"{scratch}/it"


@pytest.mark.parametrize(("model", "name"), PLACES)
def test_an_unset_variable_is_refused_by_name(model: type[Settings], name: str, tmp_path: Path) -> None:
    for text, told in {
        "$NOT_SET/it": "`NOT_SET` isn't set",
        "/data/${EMPTY}/it": "`EMPTY` is empty",
        "${SCRATCH:-/tmp}": "is no variable",
        "${SCRATCH": "is no variable",
    }.items():
        with pytest.raises(ConfigError) as raised:
            _load(model, "flag", name, text, tmp_path)
        assert told in str(raised.value) and name in str(raised.value)


def test_it_is_expanded_in_a_list_of_data_sets(scratch: Path, tmp_path: Path) -> None:
    names = ["$SCRATCH/a.jsonl", "${SCRATCH}/b.jsonl"]
    listed = json.dumps([{"dataset_name": name} for name in names])
    for way in ("flag", "variable", "yaml"):
        config = _load(TrainConfig, way, "datasets", listed, tmp_path)
        assert [it.dataset_name for it in config.data_sets] == [f"{scratch}/a.jsonl", f"{scratch}/b.jsonl"]
    with pytest.raises(ConfigError, match="`NOT_SET` isn't set"):
        _load(TrainConfig, "flag", "datasets", listed.replace("SCRATCH", "NOT_SET"), tmp_path)


def test_it_is_expanded_in_a_list_of_what_is_served(scratch: Path, tmp_path: Path) -> None:
    for way in ("flag", "variable", "yaml"):
        config = _load(ServeConfig, way, "more", "first=$SCRATCH/a,${SCRATCH}/b", tmp_path)
        assert config.more == [f"first={scratch}/a", f"{scratch}/b"]
    with pytest.raises(ConfigError, match="`NOT_SET` isn't set"):
        _load(ServeConfig, "flag", "more", "first=$NOT_SET/a", tmp_path)


def test_addresses_of_object_stores_are_expanded_and_web_addresses_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BUCKET", "rows")
    assert TrainConfig(dataset_name="s3://$BUCKET/a.jsonl").dataset_name == "s3://rows/a.jsonl"
    assert TrainConfig(model_path="gs://${BUCKET}/model").model_path == "gs://rows/model"
    url = "https://example.org/a.jsonl?top=$BUCKET"
    assert TrainConfig(dataset_name=url).dataset_name == url


def test_what_is_there_as_it_is_written_means_itself(tmp_path: Path) -> None:
    Path("$SCRATCH/run1").mkdir(parents=True)
    assert TrainConfig(home="$SCRATCH/run1").home == Path("$SCRATCH/run1")
    assert expand_variables("$$SCRATCH/$$") == "$SCRATCH/$"
    assert expand_variables("cash$/5$") == "cash$/5$"
    with pytest.raises(ConfigError, match="`NOT_SET` isn't set"):
        expand("$NOT_SET/page.html")


def test_a_template_s_own_text_is_left() -> None:
    text = "{% for m in messages %}$NOT_SET{{ m.content }}{% endfor %}"
    assert TrainConfig(chat_template=text).chat_template == text


def test_a_run_is_the_same_however_its_paths_are_written(scratch: Path) -> None:
    written = TrainConfig(model_path="$SCRATCH/model", dataset_name="${SCRATCH}/a.jsonl")
    whole = TrainConfig(model_path=f"{scratch}/model", dataset_name=f"{scratch}/a.jsonl")
    assert default_run_name(written) == default_run_name(whole)
    assert dump_settings(written) == dump_settings(whole)


def test_what_an_older_run_has_recorded_stays_as_it_is() -> None:
    dump = {**dump_settings(TrainConfig()), "home": "$NOT_SET/run1", "dataset_name": "$NOT_SET/a.jsonl"}
    config = settings_from_dump(TrainConfig, dump, ["home", "dataset_name"])
    assert (config.home, config.dataset_name) == (Path("$NOT_SET/run1"), "$NOT_SET/a.jsonl")


def test_a_job_s_variables_are_those_of_its_machine(scratch: Path, tmp_path: Path) -> None:
    words = ["--home=$NOT_SET/run1", "--model_path=$SCRATCH/m", "--dataset_name=${NOT_SET}/rows"]
    flags = parse_flags(TrainConfig, words).values
    config = load_settings(TrainConfig, None, flags, {}, as_written=True)

    refuse_relative_paths(config, own_home=False)
    (tmp_path / "job.yaml").write_text(dump_yaml(config))
    assert "home: $NOT_SET/run1" in (tmp_path / "job.yaml").read_text()

    with pytest.raises(ConfigError, match="`NOT_SET` isn't set"):  # on the machine that trains
        load_settings(TrainConfig, tmp_path / "job.yaml", {}, {})
    with pytest.raises(ConfigError, match="relative to a folder of this machine"):
        refuse_relative_paths(config.model_copy(update={"home": Path("runs/$NOT_SET")}), own_home=False)
    with pytest.raises(ConfigError, match="`adapter_path` is `runs/first`: relative"):
        refuse_relative_paths(config.model_copy(update={"adapter_path": Path("runs/first")}), own_home=False)


def test_sets_that_follow_from_a_job_s_settings_keep_its_variables() -> None:
    words = [
        '--datasets=[{"dataset_name": "$NOT_SET/a.jsonl"}, {"dataset_name": "$NOT_SET/b.jsonl"}]',
        "--validation_dataset=$NOT_SET/v.jsonl",
    ]
    config = load_settings(TrainConfig, None, parse_flags(TrainConfig, words).values, {}, as_written=True)
    names = [settings.dataset_name for settings in config.sources]
    assert names == [f"$NOT_SET/{name}.jsonl" for name in "abv"]
    refuse_relative_paths(config, own_home=True)


def test_settings_still_pickle(scratch: Path) -> None:
    config = TrainConfig(home="$SCRATCH/run1")
    assert pickle.loads(pickle.dumps(config)) == config
