"""The set that an evaluation asks: by which names it can be given, and where its rows are read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.data_sets import write_rows
from support.runs import losses, small_config, start, train_here
from support.tokenizers import build_tokenizer
from tunesmith.config import EvaluateConfig, HFDatasetConfig
from tunesmith.config.flags import parse_flags
from tunesmith.config.layers import load_settings, settings_from_dump
from tunesmith.config.reference import json_schema
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.plan import evaluation_folder, make_plan
from tunesmith.evaluate.test_set import read_test_set
from tunesmith.runs.tuned import TunedModel, find_tuned


def rows_named(name: str, number: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}?", "completion": f"{i}"} for i in range(number)]


def load(words: Sequence[str] = (), environ: dict[str, str] | None = None) -> EvaluateConfig:
    flags = parse_flags(EvaluateConfig, words, "checkpoints_dir")
    return load_settings(EvaluateConfig, flags.yaml_path, flags.values, environ or {})


def tuned_in(folder: Path) -> TunedModel:
    return TunedModel("model", folder, None)


def test_the_older_name_means_the_same_wherever_it_is_given(tmp_path: Path) -> None:
    yaml = tmp_path / "evaluate.yaml"
    yaml.write_text("test_path: rows.jsonl\n")
    configs = [
        load(["--test_path", "rows.jsonl"]),
        load(["--test-path=rows.jsonl"]),
        load([str(yaml)]),
        load(environ={"TUNESMITH_TEST_PATH": "rows.jsonl"}),
        EvaluateConfig(test_path=Path("rows.jsonl")),  # type: ignore[call-arg]
        EvaluateConfig(test_dataset="rows.jsonl"),
        settings_from_dump(EvaluateConfig, {"test_path": "rows.jsonl"}, ["test_path"]),
    ]
    assert {config.test_dataset for config in configs} == {"rows.jsonl"}
    assert all(config.model_fields_set == {"test_dataset"} for config in configs)
    assert load(["--test_path", "none"]).test_dataset is None
    assert json_schema(EvaluateConfig)["properties"]["test_path"]["deprecated"]


def test_both_names_in_one_place_are_refused(tmp_path: Path) -> None:
    yaml = tmp_path / "evaluate.yaml"
    yaml.write_text("test_path: a.jsonl\ntest_dataset: b.jsonl\n")
    with pytest.raises(ConfigError, match="gives `test_dataset` and `test_path`, its older name"):
        load([str(yaml)])
    with pytest.raises(ConfigError, match="TUNESMITH_TEST_PATH` give the same setting"):
        load(environ={"TUNESMITH_TEST_PATH": "a.jsonl", "TUNESMITH_TEST_DATASET": "b.jsonl"})
    with pytest.raises(ValueError, match="`test_path` is the older name of `test_dataset`"):
        EvaluateConfig(test_path="a.jsonl", test_dataset="b.jsonl")  # type: ignore[call-arg]


def test_a_folder_is_read_at_its_split(tmp_path: Path) -> None:
    for split, number in (("test", 3), ("validation", 2)):
        write_rows(tmp_path / f"{split}.jsonl", rows_named(split, number))

    def texts(**given: str) -> list[str]:
        config = EvaluateConfig(test_dataset=str(tmp_path), **given)  # type: ignore[arg-type]
        found = read_test_set(tuned_in(tmp_path), config, build_tokenizer("byte_bpe"))
        return [prompt.text for prompt in found.samples.values()]

    assert texts() == ["test 0?", "test 1?", "test 2?"]
    assert texts(test_split="validation") == ["validation 0?", "validation 1?"]


def test_each_test_set_has_a_folder_of_its_own(tmp_path: Path) -> None:
    def name(**given: str) -> str:
        config = EvaluateConfig(home=tmp_path, **given)  # type: ignore[arg-type]
        return evaluation_folder(config, tuned_in(tmp_path / "model")).name

    names = [
        name(),
        name(test_dataset="a/rows.jsonl"),
        name(test_dataset="org/rows", test_split="test[:10%]"),
        name(test_split="dev"),
    ]
    assert [it.partition("-")[2].partition("-")[2] for it in names] == ["", "rows", "rows-test_10_", "dev"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"test_dataset": "absent.jsonl"}, "there is no test file `absent.jsonl`"),
        ({"test_dataset": "{folder}/empty.jsonl"}, "is empty"),
        ({"test_split": "dev"}, "`test_split` is `dev`, and no data set is known"),
    ],
)
def test_what_can_t_be_asked_is_refused(given: dict[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    config = EvaluateConfig(**{name: value.format(folder=tmp_path) for name, value in given.items()})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        read_test_set(tuned_in(tmp_path), config, build_tokenizer("byte_bpe"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "all of it"}], "asks anything: there is no prompt to answer"),
        ([{"prompt": "1?", "completion": ""}] * 2, "can be compared: 2 with no answer to compare with"),
        (
            [{"messages": [{"role": "user", "content": "1?"}]}],
            "can be compared: 1 with no answer to compare with",
        ),
        (
            [{"prompt": "1?", "completion": "<think>one</think>"}],
            "can be compared: 1 with an answer that is reasoning alone",
        ),
    ],
)
def test_rows_that_ask_nothing_say_why(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    config = EvaluateConfig(test_dataset=str(write_rows(tmp_path / "rows.jsonl", rows)))
    with pytest.raises(DataError, match=message):
        read_test_set(tuned_in(tmp_path), config, build_tokenizer("chatml"))


def test_a_folder_without_a_test_file_is_told_with_the_flag_for_another_split(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "train.jsonl", rows_named("train", 2))
    config = EvaluateConfig(test_dataset=str(folder))
    with pytest.raises(DataError, match="has no file of split `test`") as caught:
        read_test_set(tuned_in(tmp_path), config, build_tokenizer("byte_bpe"))
    assert "name another --test_split" in str(caught.value.hint)
    config = EvaluateConfig(test_dataset=str(folder), test_split="train")
    assert len(read_test_set(tuned_in(tmp_path), config, build_tokenizer("byte_bpe")).samples) == 2


def test_another_split_of_what_was_trained_on_is_asked(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        write_rows(folder / f"{split}.jsonl", rows_named(split, 2))
    recorded = {"data": {"data_dir": str(tmp_path / "prepared")}}
    dataset = HFDatasetConfig(dataset_name=str(folder))
    tuned = TunedModel("model", tmp_path, None, params=recorded, dataset=dataset)
    found = read_test_set(tuned, EvaluateConfig(test_split="dev"), build_tokenizer("byte_bpe"))
    assert [prompt.text for prompt in found.samples.values()] == ["dev 0?", "dev 1?"]
    for trained in ("train", "Training"):
        with pytest.raises(DataError, match=f"`test_split` is `{trained}`, which is trained on"):
            read_test_set(tuned, EvaluateConfig(test_split=trained), build_tokenizer("byte_bpe"))


@pytest.mark.usefixtures("alone")
def test_a_run_s_own_test_set_is_asked_by_default(
    model_of: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "own.jsonl", [{"question": f"own {i}", "answer": f"{i}"} for i in range(4)])
    held = write_rows(
        tmp_path / "held.jsonl", [{"question": f"held {i}", "answer": f"{i}"} for i in range(3)]
    )
    changes = {"test_dataset": path, "validation_dataset": held, "max_steps": 1}
    run = train_here(start(small_config(model_of("llama"), rows, tmp_path / "home", **changes)))
    assert set(losses(run, "eval_loss")) == {0, 1}
    config = EvaluateConfig(checkpoints_dir=str(run.path), engine="transformers")
    plan = make_plan(config, find_tuned(config), use_gpu=False)
    asked = [prompt.text.rstrip(" ") for prompt in plan.test_set.samples.values()]
    assert asked == [f"own {i}" for i in range(4)]
    assert evaluation_folder(config, plan.tuned).name == plan.tuned.folder.name
    assert run.read_params()["data"]["row_format"] == ["template"] * 3
