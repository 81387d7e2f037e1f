"""The command line's words: flags, switches, the YAML file's place, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.config.flags import parse_flags
from tunesmith.config.layers import load_settings
from tunesmith.errors import ConfigError

SWITCHES = sorted(
    name for name, info in TrainConfig.model_fields.items() if info.annotation in (bool, bool | None)
)


def parse(*words: str) -> tuple[str | None, dict[str, str]]:
    parsed = parse_flags(TrainConfig, words)
    return (None if parsed.yaml_path is None else str(parsed.yaml_path)), dict(parsed.values)


def refused(*words: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        parse_flags(TrainConfig, words)
    assert error.value.hint
    return error.value


@pytest.mark.parametrize("name", TrainConfig.model_fields)
@pytest.mark.parametrize("dashes", [True, False])
def test_every_flag_is_spelt_with_dashes_or_underscores(name: str, dashes: bool) -> None:
    flag = "--" + (name.replace("_", "-") if dashes else name)
    if name in SWITCHES:
        assert parse(flag) == (None, {name: "true"})
    else:
        assert parse(flag, "5") == (None, {name: "5"})
    assert parse(f"{flag}=5") == (None, {name: "5"})


@pytest.mark.parametrize("name", HFDatasetConfig.model_fields)
def test_flags_of_the_data_set_take_the_prefix_hfdc(name: str) -> None:
    assert parse(f"--hfdc_{name}=5", f"--hfdc-{name}=7") == (None, {name: "7"})


def test_the_prefix_hfdc_is_for_the_data_set_alone() -> None:
    error = refused("--hfdc_max_steps", "5")
    assert "`--hfdc_max_steps`" in error.message
    assert error.hint == "did you mean `--max_steps`?"


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_leaves_the_next_word_alone_unless_it_is_a_boolean(name: str) -> None:
    assert parse(f"--{name}", "run.yaml") == ("run.yaml", {name: "true"})
    assert parse(f"--{name}", "--max_steps", "5") == (None, {name: "true", "max_steps": "5"})
    for word in ("true", "False", "YES", "no", "1", "0"):
        assert parse(f"--{name}", word, "run.yaml") == ("run.yaml", {name: word})
    for word in ("on", "2", "t", ""):
        assert parse(f"--{name}", word)[1] == {name: "true"}


@pytest.mark.parametrize("flag", ["--no-use_wandb", "--no_use_wandb", "--no-use-wandb", "--use_wandb=false"])
def test_a_switch_is_turned_off(flag: str) -> None:
    flags = parse_flags(TrainConfig, ["--use_wandb", flag, "run.yaml"])
    assert flags.yaml_path == Path("run.yaml")
    assert load_settings(TrainConfig, None, flags.values, {}).use_wandb is False


def test_a_switch_that_can_be_automatic_takes_auto_as_its_next_word() -> None:
    assert parse("--use_gpu", "auto", "run.yaml") == ("run.yaml", {"use_gpu": "auto"})
    assert parse("--use_gpu", "AUTO") == (None, {"use_gpu": "AUTO"})
    assert parse("--use_wandb", "auto") == ("auto", {"use_wandb": "true"})
    assert parse("--no-use_gpu", "auto") == ("auto", {"use_gpu": "false"})


def test_only_a_switch_has_a_no_form_and_it_takes_no_value() -> None:
    assert "`max_steps` isn't true or false" in refused("--no-max_steps").message
    assert "`--no-use_wandb` takes no value" in refused("--no-use_wandb=true").message
    assert refused("--no-use_wand").hint == "did you mean `--no-use_wandb`?"


def test_a_flag_given_twice_counts_as_given_last() -> None:
    assert parse("--max_steps", "5", "--max-steps=7") == (None, {"max_steps": "7"})
    assert parse("--no-packing", "--packing") == (None, {"packing": "true"})


def test_a_value_may_start_with_a_dash_only_after_an_equals_sign() -> None:
    assert parse("--output_template=- {output}") == (None, {"output_template": "- {output}"})
    assert parse("--weight_decay=-1") == (None, {"weight_decay": "-1"})
    error = refused("--weight_decay", "-1")
    assert "`--weight_decay` has no value" in error.message
    assert "`--weight_decay=-1`" in str(error.hint)


def test_a_value_may_be_empty_or_hold_equals_signs() -> None:
    assert parse("--input_template", "") == (None, {"input_template": ""})
    assert parse("--input_template=") == (None, {"input_template": ""})
    assert parse("--field_mapping=a=b,c=d") == (None, {"field_mapping": "a=b,c=d"})


@pytest.mark.parametrize("words", [["--max_steps"], ["--max_steps", "--use_wandb"], ["--max-steps", "-h"]])
def test_a_flag_without_its_value_is_refused(words: list[str]) -> None:
    error = refused(*words)
    assert f"`{words[0]}` has no value" in error.message
    assert "a whole number of at least 1" in str(error.hint)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--max_step", "--max_steps"),
        ("--max-stpes=5", "--max_steps"),
        ("--Learning_Rate", "--learning_rate"),
        ("--lora_r", "--lora_rank"),
        ("--epochs", "--num_train_epochs"),
        ("--batch_size", "--per_device_train_batch_size"),
        ("-max_steps", "--max_steps"),
        ("--use_wand", "--use_wandb"),
    ],
)
def test_a_misspelt_flag_is_refused_with_the_nearest_name(flag: str, meant: str) -> None:
    error = refused(flag, "5")
    assert error.message == f"unknown flag `{flag.partition('=')[0]}`"
    assert error.hint == f"did you mean `{meant}`?"


def test_a_flag_that_is_near_nothing_points_to_the_help() -> None:
    assert refused("--zzz").hint == "`--help` lists the flags"


def test_two_yaml_files_are_refused() -> None:
    error = refused("a.yaml", "--max_steps", "5", "b.yaml")
    assert "`a.yaml`" in error.message
    assert "`b.yaml`" in error.message


names = st.sampled_from(sorted(TrainConfig.model_fields))
words = st.one_of(
    st.text(max_size=8),
    st.builds("--{}".format, names),
    st.builds("--no-{}".format, names),
    st.builds("--{}={}".format, names, st.text(max_size=5)),
    st.sampled_from(["--", "-", "---", "--=", "--no-", "--no_", "--hfdc_", "=", "true", "auto", "run.yaml"]),
)


@settings(deadline=None)
@given(st.lists(words, max_size=6))
def test_any_words_are_read_or_refused_clearly(argv: list[str]) -> None:
    with contextlib.suppress(ConfigError):
        parsed = parse_flags(TrainConfig, argv)
        assert set(parsed.values) <= set(TrainConfig.model_fields)


@settings(deadline=None)
@given(st.dictionaries(names, st.text(max_size=5), max_size=5), st.booleans())
def test_values_given_with_an_equals_sign_arrive_unchanged(values: dict[str, str], dashes: bool) -> None:
    argv = [f"--{name.replace('_', '-') if dashes else name}={value}" for name, value in values.items()]
    assert parse_flags(TrainConfig, argv).values == values
