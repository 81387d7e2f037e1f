"""The framework's scripts: thin doors to the verbs, whose defaults a user may edit or replace."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from support.helm import CHART
from tunesmith.chart.scripts import fine_tune_words
from tunesmith.config import TrainConfig
from tunesmith.config.flags import parse_flags
from tunesmith.config.layers import load_settings
from tunesmith.data.split import check_sources
from tunesmith.errors import ConfigError, DataError

SCRIPTS = CHART / "scripts" / "ray_train"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """`load(file=(old, new), …)` imports fine_tune.py from a copy of the scripts with these edits."""

    def load_scripts(**edits: tuple[str, str]) -> ModuleType:
        folder = tmp_path / "scripts"
        shutil.copytree(SCRIPTS, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for name, (old, new) in edits.items():
            path = folder / f"{name}.py"
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new))
        monkeypatch.syspath_prepend(str(folder))
        forget()
        return importlib.import_module("fine_tune")

    def forget() -> None:
        for name in ("fine_tune", "dataset_module"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()

    yield load_scripts
    forget()


def config_of(script: ModuleType, *words: str) -> TrainConfig:
    """Return the settings that the script trains with."""
    converter = getattr(script.dataset_module, "convert", None)
    flags = parse_flags(TrainConfig, fine_tune_words(script.Config, converter, words))
    return load_settings(TrainConfig, flags.yaml_path, flags.values, os.environ)


def test_the_script_as_it_is_adds_a_home_and_nothing_else(
    load: Callable[..., ModuleType], home: Path
) -> None:
    script = load()
    assert fine_tune_words(script.Config, None, ["--lora_rank=8"]) == ["--lora_rank=8", f"--home={home}"]
    assert script.Config().hf_dataset_config.dataset_name == TrainConfig().dataset_name


def test_a_home_that_was_given_is_kept(
    load: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load()
    assert config_of(script, "--home=/a").home == Path("/a")
    (tmp_path / "run.yaml").write_text("home: /b\n")
    assert config_of(script, str(tmp_path / "run.yaml")).home == Path("/b")
    monkeypatch.setenv("TUNESMITH_HOME", "/c")
    assert config_of(script).home == Path("/c")


def test_an_edited_default_counts_and_a_flag_beats_it(load: Callable[..., ModuleType]) -> None:
    script = load(fine_tune=("lora_rank: int = 32", "lora_rank: int = 8\n    seed: int = 3"))
    config = config_of(script)
    assert (config.lora_rank, config.seed) == (8, 3)
    assert config_of(script, "--lora_rank=4").lora_rank == 4


def test_an_edited_data_set_counts_and_only_what_was_edited(
    load: Callable[..., ModuleType], rows: Path
) -> None:
    old = '''dataset_name="cognitivecomputations/dolphin"'''
    script = load(fine_tune=(old, f"dataset_name={str(rows)!r}"))
    config = config_of(
        script, "--field_mapping=instruction=question,output=answer", "--hfdc_input_template={instruction}"
    )
    assert config.dataset_name == str(rows)
    assert config.dataset_config is None
    assert config.field_mapping == {"instruction": "question", "output": "answer"}
    assert "output_template" not in config.model_fields_set


def test_an_edit_that_is_no_setting_is_refused_by_name(load: Callable[..., ModuleType]) -> None:
    script = load(fine_tune=("lora_rank: int = 32", "lora_rnk: int = 32"))
    with pytest.raises(ConfigError, match="lora_rnk"):
        config_of(script)


def test_an_edit_of_a_wrong_type_is_refused_by_name(load: Callable[..., ModuleType]) -> None:
    script = load(fine_tune=("train_split_ratio=0.9", "train_split_ratio=9"))
    with pytest.raises(ConfigError, match="train_split_ratio"):
        config_of(script)


CONVERT = """
def convert(row):
    return {"input": row["question"] + "|", "output": row["answer"]}


__all__ ="""


def test_a_converter_of_the_data_module_makes_the_text(
    load: Callable[..., ModuleType], rows: Path, home: Path
) -> None:
    config = config_of(load(dataset_module=("\n__all__ =", CONVERT)), f"--dataset_name={rows}")
    made = [json.loads(line) for line in Path(config.dataset_name).read_text().splitlines()]
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    assert made == [{"input": row["question"] + "|", "output": row["answer"]} for row in given]
    assert Path(config.dataset_name).parent == home / "datasets"
    (row_format,) = check_sources(config)
    assert row_format.render(made[0], "here") == made[0]


def test_another_converter_makes_another_data_set(
    load: Callable[..., ModuleType], rows: Path, tmp_path: Path
) -> None:
    names = set()
    for mark in ("|", "!"):
        script = load(dataset_module=("\n__all__ =", CONVERT.replace("|", mark)))
        names |= {config_of(script, f"--dataset_name={rows}").dataset_name for _ in range(2)}
        shutil.rmtree(tmp_path / "scripts")
    assert len(names) == 2


OWN_MODULE = """
from dataclasses import dataclass
from typing import Callable, Optional


def to_messages(sample):
    return {"messages": [{"role": "user", "content": sample["question"]}, {"role": "assistant", "content": sample["answer"]}]}


@dataclass
class HFDatasetConfig:
    dataset_name: str
    dataset_config: Optional[str] = None
    split: str = "train"
    train_split_ratio: float = 0.9
    val_test_split_ratio: float = 0.5
    input_template: str = ""
    output_template: str = ""
    field_mapping: Optional[dict] = None
    num_proc: int = 8
    load_kwargs: Optional[dict] = None
    custom_converter: Optional[Callable] = to_messages
"""


def test_a_data_module_of_ones_own_is_taken_whole(load: Callable[..., ModuleType], rows: Path) -> None:
    whole = (SCRIPTS / "dataset_module.py").read_text()
    script = load(dataset_module=(whole, OWN_MODULE))
    config = config_of(script, f"--dataset_name={rows}", "--dataset_config=none")
    assert check_sources(config)[0].name == "messages"


@pytest.mark.parametrize("body", ["return row['nowhere']", "return row['answer']", "return {'input': 'x'}"])
def test_a_converter_that_fails_names_the_row_and_leaves_nothing(
    load: Callable[..., ModuleType], rows: Path, home: Path, body: str
) -> None:
    script = load(dataset_module=("\n__all__ =", f"\ndef convert(row):\n    {body}\n\n\n__all__ ="))
    with pytest.raises(DataError, match=r"`convert` .*rows\.jsonl"):
        config_of(script, f"--dataset_name={rows}")
    assert list((home / "datasets").iterdir()) == []


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("fine_tune.py", ['--hf_model_id="Qwen/Qwen3-14B"', "--lora_rnk=8"], "did you mean `--lora_rank`?"),
        ("fine_tune.py", ["--dataset_name=/nowhere.jsonl"], "no such file or folder: `/nowhere.jsonl`"),
        ("test_checkpoint.py", ["--max_samples=8", "--batch_size=4"], "there is no run under `{home}`"),
        ("convert_checkpoint_to_hf.py", ["--no_merge"], "there is no run under `{home}`"),
    ],
)
@pytest.mark.slow
def test_the_scripts_speak_for_the_verbs(home: Path, script: str, words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert said.format(home=home) in done.stderr
