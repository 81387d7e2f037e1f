"""The YAML file: what it may look like, and what is refused with its line."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config import TrainConfig
from tunesmith.config.flags import parse_flags
from tunesmith.config.layers import load_settings
from tunesmith.errors import ConfigError


def load(text: str | bytes, folder: Path) -> TrainConfig:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings(TrainConfig, path, {}, {})


def refused(text: str | bytes, folder: Path) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        load(text, folder)
    assert error.value.hint
    return error.value


@pytest.mark.parametrize("text", ["", "# max_steps: 5\n", "---\n", "hf_dataset_config:\n", "{}"])
def test_yaml_without_settings_gives_nothing(text: str, tmp_path: Path) -> None:
    assert load(text, tmp_path).model_fields_set == set()


def test_yaml_reads_as_people_expect(tmp_path: Path) -> None:
    text = """
learning_rate: 5e-4
weight_decay: 1e-2
run_name: 2026-11-22
dataset_config: no
model_revision: on
max_steps: 010
split: 1:30
use_wandb: yes
num_workers: auto
use_gpu:
"""
    config = load(text, tmp_path)
    assert (config.learning_rate, config.weight_decay, config.max_steps) == (5e-4, 1e-2, 10)
    assert (config.run_name, config.dataset_config) == ("2026-11-22", "no")
    assert (config.model_revision, config.split) == ("on", "1:30")
    assert (config.use_wandb, config.num_workers, config.use_gpu) == (True, None, None)


def test_yaml_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load("\ufeffmax_steps: 5", tmp_path).max_steps == 5


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no YAML file `.*nope\.yaml`"):
        load_settings(TrainConfig, tmp_path / "nope.yaml", {}, {})


@pytest.mark.parametrize("word", ["https://u:hush@h/x.yaml", "s3://b/x.yaml?token=hush.yaml"])
@pytest.mark.parametrize("others", [[], ["b.yaml"]])
def test_an_address_in_place_of_a_yaml_file_shows_no_secret(word: str, others: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load_settings(TrainConfig, parse_flags(TrainConfig, [word, *others]).yaml_path, {}, {})
    assert "hush" not in str(raised.value)
    assert "x.yaml" in str(raised.value)


def test_a_folder_is_no_yaml_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        load_settings(TrainConfig, tmp_path, {}, {})


@pytest.mark.parametrize("text", ["- max_steps", "max_steps=5", "5", "true"])
def test_yaml_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    assert "run.yaml` holds no settings" in refused(text, tmp_path).message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("max_steps: 5\ninput_template: Q: {q}", 2),
        ("max_steps: 5\n\noutput_template: '{output}\n", 3),
        ("a: 1\n\tb: 2", 2),
        ("max_steps: 5\n---\nmax_steps: 6", 2),
        ("max_steps: 5\nrun_name: a\x07", 2),
        ("max_steps: !!python/object:os.system 5", 1),
    ],
)
def test_broken_yaml_is_refused_with_its_line(text: str, line: int, tmp_path: Path) -> None:
    message = refused(text, tmp_path).message
    assert "isn't YAML" in message
    assert f"run.yaml` line {line} " in message or f"run.yaml` line {line + 1} " in message


def test_a_wrong_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    error = refused("max_steps: 5\nrun_name: café".encode("latin-1"), tmp_path)
    assert "run.yaml` line 2 isn't UTF-8: byte 0xe9" in error.message
    assert error.hint == "save the file as UTF-8"


@pytest.mark.parametrize("key", ["max_steps", "hf_dataset_config:\n  split"])
def test_a_key_given_twice_is_refused(key: str, tmp_path: Path) -> None:
    last = key.split()[-1]
    indent = "  " if "\n" in key else ""
    error = refused(f"{key}: a\n{indent}{last}: b", tmp_path)
    assert f"`{last}` is given twice, first on line" in error.message


def test_a_key_given_with_and_without_dashes_is_refused(tmp_path: Path) -> None:
    assert "`max_steps` twice" in refused("max_steps: 5\nmax-steps: 6", tmp_path).message


def test_a_misspelt_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    error = refused("max_step: 5", tmp_path)
    assert error.message.endswith("run.yaml`: unknown setting `max_step`")
    assert error.hint == "did you mean `max_steps`?"


def test_all_misspelt_keys_are_named_at_once(tmp_path: Path) -> None:
    message = refused("max_step: 5\n5: 5\nhf_dataset_config: {splt: a, max_steps: 5}", tmp_path).message
    assert "(did you mean `max_steps`?)" in message
    assert "unknown setting `5`" in message
    assert "hf_dataset_config`: unknown setting `splt` (did you mean `split`?)" in message
    assert "hf_dataset_config`: unknown setting `max_steps`" in message


def test_a_setting_given_flat_and_grouped_is_refused(tmp_path: Path) -> None:
    message = refused("split: train\nhf_dataset_config:\n  split: test", tmp_path).message
    assert "gives `split` both by itself and under `hf_dataset_config`" in message


def test_the_data_set_group_must_be_a_mapping(tmp_path: Path) -> None:
    assert "hf_dataset_config` is `data.jsonl`" in refused("hf_dataset_config: data.jsonl", tmp_path).message


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_any_bytes_are_read_as_yaml_or_refused_clearly(tmp_path_factory: Any, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    with contextlib.suppress(ConfigError):
        load_settings(TrainConfig, path, {}, {})


@pytest.mark.parametrize(
    "text", ["max_steps: !!bool 3", "home: !!timestamp x", "max_steps: !!int x", "[" * 3000]
)
def test_yaml_that_breaks_its_own_parser_is_refused_clearly(text: str, tmp_path: Path) -> None:
    assert "isn't YAML" in refused(text, tmp_path).message
