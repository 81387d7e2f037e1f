"""The JSON schema, dumps, the help and the reference page say what the settings really take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from support.paths import REPOSITORY
from tunesmith.config import (
    ConvertConfig,
    EvaluateConfig,
    HFDatasetConfig,
    Settings,
    TrainConfig,
    setting,
)
from tunesmith.config.declare import NAME_PATTERN
from tunesmith.config.layers import dump_settings, dump_yaml, load_settings, settings_from_dump
from tunesmith.config.reference import format_help, format_markdown, json_schema
from tunesmith.config.yaml_file import write_yaml
from tunesmith.errors import ConfigError

SCHEMA = json_schema(TrainConfig)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

# YAML has no control characters but these, and `auto`, `none` and the like unset an optional setting. Dollars are
# variables in paths.
texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t", exclude_characters="$"),
    min_size=1,
    max_size=12,
)
plain_texts = texts.filter(lambda text: text.strip().lower() not in ("", "auto", "none", "null"))
# What has a grammar of its own, which the schema doesn't tell.
OWN_GRAMMARS: dict[str, list[Any]] = {
    "message_keys": [{}, {"role": "speaker", "content": "text"}, "role=speaker"],
    "role_names": [{}, {"assistant": "bot"}, "bot=assistant"],
    "init_lora_weights": ["false", "gaussian", "olora", "pissa_niter_12"],
    "train_on": ["all_turns", "last_assistant_turn", "user,assistant"],
}
DECLARED = TrainConfig.model_json_schema()["properties"]


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Values that the declaration of `name` allows, drawn from pydantic's own schema of it."""
    if name in OWN_GRAMMARS:
        return st.sampled_from(OWN_GRAMMARS[name])
    schema = DECLARED[name]
    branches = schema.get("anyOf", [schema])
    value = next(branch for branch in branches if branch["type"] != "null")
    strategies = {
        "boolean": st.booleans(),
        "integer": st.integers(value.get("minimum", 0), 2**31 - 1),
        "number": st.floats(0, value.get("maximum", 0.99)).filter(
            lambda number: number > value.get("exclusiveMinimum", -1)
        ),
        "string": st.sampled_from(value["enum"]) if "enum" in value else plain_texts,
        "name": st.from_regex(NAME_PATTERN, fullmatch=True),
        "array": st.lists(plain_texts, min_size=value.get("minItems", 0), max_size=3),
        "object": st.dictionaries(plain_texts, texts, max_size=3),
    }
    strategy = strategies["name" if value.get("pattern") == NAME_PATTERN else value["type"]]
    return st.one_of(strategy, st.none(), st.just("auto")) if len(branches) > 1 else strategy


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Valid contents of a YAML file, with the data set's settings flat or grouped, or with several data sets."""
    names = draw(st.sets(st.sampled_from(sorted(set(TrainConfig.model_fields) - {"datasets"})), max_size=8))
    config = {name: draw(values_of(name)) for name in sorted(names)}
    rates = sorted(config.get(name, 1e-5) for name in ("min_learning_rate", "learning_rate"))
    config |= {"min_learning_rate": rates[0], "learning_rate": max(rates[1], 1e-9)}
    for name in {"run_name", "results_dir"} & config.keys():
        config[name] = "run-" + "".join(c for c in str(config[name]) if c.isprintable() and c != "/")
    way = draw(st.sampled_from(["flat", "grouped", "several"]))
    if way != "flat":
        grouped = {name: config.pop(name) for name in list(config) if name in HFDatasetConfig.model_fields}
        if way == "grouped":
            config["hf_dataset_config"] = grouped
        else:
            grouped.pop("num_proc", None)
            config["datasets"] = [{"dataset_name": "first", **grouped}, {"dataset_name": draw(plain_texts)}]
    assume(not exclude_one_another(config))
    return config


def exclude_one_another(config: dict[str, Any]) -> bool:
    """Tell whether settings that are good by themselves are refused together, of which a schema knows nothing."""
    try:
        TrainConfig.model_validate(config)
    except ValidationError as error:
        return not any(each["loc"] for each in error.errors())
    return False


def load(data: dict[str, Any], folder: Path) -> TrainConfig:
    path = folder / "run.yaml"
    path.write_text(write_yaml(data), encoding="utf-8")
    return load_settings(TrainConfig, path, {}, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings")


def test_the_schema_is_a_valid_one_and_describes_every_setting() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(SCHEMA["properties"]) == {*TrainConfig.model_fields, "hf_dataset_config"}
    assert set(SCHEMA["properties"]["hf_dataset_config"]["properties"]) == set(HFDatasetConfig.model_fields)
    assert [name for name, schema in SCHEMA["properties"].items() if not schema["description"]] == []
    defaults = {
        name: schema["default"] for name, schema in SCHEMA["properties"].items() if "default" in schema
    }
    assert {name: getattr(TrainConfig(), name) for name in defaults} == defaults
    assert set(TrainConfig.model_fields) - set(defaults) == {"dataset_config", "field_mapping"}
    json.dumps(SCHEMA)


@settings(deadline=None)
@given(configs())
def test_schema_and_loader_accept_the_same_files(folder: Path, data: dict[str, Any]) -> None:
    VALIDATOR.validate(data)
    config = load(data, folder)
    grouped = data.pop("hf_dataset_config", {})
    assert config.model_fields_set == {*data, *grouped}


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_schema_and_loader_agree_on_every_setting(name: str, folder: Path) -> None:
    pool = [
        True,
        False,
        None,
        -1,
        0,
        1,
        2,
        3.0,
        -0.5,
        0.5,
        2**31,
        "auto",
        "none",
        "text",
        "cosine",
        "float32",
    ]
    pool += [[], ["a"], [1], {}, {"a": "b"}, {"a": 1}]
    for value in pool:
        if (
            value in (0, 1)
            and not isinstance(value, bool)
            and SCHEMA["properties"][name].get("type") == "boolean"
        ):
            continue  # 0 and 1 are accepted for false and true; the schema asks for the proper words
        if name in ("use_gpu", "gradient_checkpointing") and value in (0, 1) and not isinstance(value, bool):
            continue
        if SCHEMA["properties"][name].get("description", "").count("→") and isinstance(value, str | dict):
            continue  # `column=name` is a text of its own grammar, and what may be named isn't told
        data = {name: value} if name != "learning_rate" else {name: value, "min_learning_rate": 0}
        if name == "min_learning_rate":
            data["learning_rate"] = 2.0**40
        try:
            load(data, folder)
            loads = True
        except ConfigError:
            loads = False
        assert VALIDATOR.is_valid(data) == loads, (name, value)


def test_the_schema_refuses_unknown_keys() -> None:
    assert not VALIDATOR.is_valid({"max_step": 5})
    assert not VALIDATOR.is_valid({"hf_dataset_config": {"max_steps": 5}})
    assert VALIDATOR.is_valid({"hf_dataset_config": None})


@settings(deadline=None)
@given(configs())
def test_a_dump_reads_back_with_what_was_given(folder: Path, data: dict[str, Any]) -> None:
    config = load(data, folder)
    dump = json.loads(json.dumps(dump_settings(config)))
    assert set(dump) == set(TrainConfig.model_fields)
    again = settings_from_dump(TrainConfig, dump, sorted(config.model_fields_set))
    assert again == config
    assert again.model_fields_set == config.model_fields_set
    assert dump_settings(again) == dump


@settings(deadline=None)
@given(configs())
def test_settings_written_as_yaml_read_back(folder: Path, data: dict[str, Any]) -> None:
    config = load(data, folder)
    path = folder / "again.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    again = load_settings(TrainConfig, path, {}, {})
    assert again == config
    assert again.model_fields_set == config.model_fields_set


@pytest.mark.parametrize(
    "text", ["5e-5", "on", "no", "1:30", "2026-11-22", "010", "~", "=", "<<", "0x1F", ".5", "1_000"]
)
def test_texts_that_look_like_something_else_stay_texts_in_yaml(text: str, folder: Path) -> None:
    config = TrainConfig(split=text, field_mapping={text: text})
    (folder / "odd.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load_settings(TrainConfig, folder / "odd.yaml", {}, {}) == config


def test_a_config_without_given_settings_is_an_empty_yaml_file() -> None:
    assert dump_yaml(TrainConfig()) == ""


def test_a_dump_of_another_version_is_refused_or_completed() -> None:
    dump = dump_settings(TrainConfig())
    with pytest.raises(ConfigError, match="recorded settings are unknown here: `warp`"):
        settings_from_dump(TrainConfig, {**dump, "warp": 9}, [])
    with pytest.raises(ConfigError, match="`recorded max_steps` is `0`; it must be a whole number"):
        settings_from_dump(TrainConfig, {**dump, "max_steps": 0}, [])
    del dump["max_failures"]
    assert settings_from_dump(TrainConfig, dump, ["seed"]).max_failures == 2


@pytest.mark.parametrize("width", [60, 80, 200])
def test_help_shows_every_flag_with_default_and_description_and_keeps_the_width(width: int) -> None:
    text = format_help(TrainConfig, "usage: x", width)
    flat = " ".join(text.split())
    for name, info in TrainConfig.model_fields.items():
        assert f"--{name} " in flat or f"--[no-]{name} " in flat
        assert " ".join(str(info.description).split()) in flat
    assert "[10000]" in flat
    assert "[auto]" in flat
    assert "One of cosine, linear, constant." in flat
    assert max(map(len, text.splitlines())) <= width


def test_help_takes_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    assert format_help(TrainConfig, "") == format_help(TrainConfig, "", 72)
    assert format_help(TrainConfig, "") != format_help(TrainConfig, "", 120)


def test_help_goes_by_groups_in_a_sensible_order() -> None:
    lines = format_help(TrainConfig, "usage: x", 100).splitlines()
    titles = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Model", "Data", "Training", "Adapter", "Evaluation", "Memory", "Cluster", "Output"]


def test_schema_and_help_work_for_any_settings() -> None:
    class MergeConfig(Settings):
        merge: bool = setting(True, "Merge the adapter.", group="export", scope="run")

    assert list(json_schema(MergeConfig)["properties"]) == ["merge"]
    assert "Export:\n  --[no-]merge" in format_help(MergeConfig, "usage: x", 80)


@pytest.mark.parametrize(
    ("verb", "model", "page"),
    [
        ("train", TrainConfig, "settings.md"),
        ("evaluate", EvaluateConfig, "settings-evaluate.md"),
        ("convert", ConvertConfig, "settings-convert.md"),
    ],
)
def test_the_reference_page_in_docs_is_current(verb: str, model: type[Settings], page: str) -> None:
    path = REPOSITORY / "docs" / page
    assert path.read_text(encoding="utf-8") == format_markdown(model, verb), (
        f"renew it: tunesmith schema {verb} --format markdown > docs/{page}"
    )


def test_the_reference_page_holds_every_setting_in_a_well_formed_row() -> None:
    rows = [line for line in format_markdown(TrainConfig, "train").splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(TrainConfig.model_fields)
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}
