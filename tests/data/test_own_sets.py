"""Validation and test sets of one's own, in place of what is split off the data set."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from support.data_sets import CHAT, SUM_TEMPLATES, SUMS, prepare_both, read_set, write_rows
from support.tokenizers import build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.config.layers import load_settings
from tunesmith.data.mixture import dataset_of, prompt_of, recorded_formats, without_tag
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.split import SETS, check_sources
from tunesmith.errors import ConfigError, DataError

PAIRS = [{"prompt": f"{i} + 1? ", "completion": f"{i + 1}"} for i in range(50, 70)]


def prepare_sums(folder: Path, tokenizer: str = "chatml", **changes: Any) -> tuple[TrainConfig, Prepared]:
    """Prepare 60 sums as prompt and completion, with these settings."""
    rows = [{"prompt": row["q"], "completion": row["a"]} for row in SUMS]
    config = TrainConfig(dataset_name=write_rows(folder / "sums.jsonl", rows), num_proc=1, **changes)
    return config, prepare(config, build_tokenizer(tokenizer), folder / "datasets")


def rows_of(prepared: Prepared, name: str) -> list[dict[str, Any]]:
    return [without_tag(row) for row in read_set(prepared, name)]


@pytest.mark.parametrize("parts", [["validation"], ["test"], ["validation", "test"]], ids=str)
def test_a_set_of_one_s_own_stands_in_place_of_its_part_of_the_split(
    parts: list[str], tmp_path: Path
) -> None:
    own = [{"input": f"own {i}", "instruction": "say", "output": str(i)} for i in range(10)]
    path = write_rows(tmp_path / "own.jsonl", own)
    _, split = prepare_sums(tmp_path, train_split_ratio=0.6)
    config, prepared = prepare_sums(
        tmp_path, train_split_ratio=0.6, **{f"{part}_dataset": path for part in parts}
    )
    for part in ("validation", "test"):
        if part in parts:  # rendered by the set's own format, which is Alpaca's
            assert [row["output"] for row in rows_of(prepared, part)] == [
                f"### Response:\n{i}" for i in range(10)
            ]
        else:
            assert rows_of(prepared, part) == rows_of(split, part) != []
    # What would have been split off trains.
    trained = [*rows_of(split, "training"), *(row for part in parts for row in rows_of(split, part))]
    key = json.dumps
    assert sorted(map(key, rows_of(prepared, "training"))) == sorted(map(key, trained))
    assert len(trained) == {1: 48, 2: 60}[len(parts)]
    assert prepared.stats.overlap == dict.fromkeys(parts, 0)
    # The prompts are read by what was recorded.
    tokenizer = build_tokenizer("chatml")
    formats = [
        it.with_tokenizer(tokenizer, "2026-01-31")
        for it in recorded_formats(prepared.row_format, config.sources)
    ]
    prompts = [prompt_of(formats, row) for row in read_set(prepared, "test")]
    answers = {prompt.reference for prompt in prompts if prompt is not None}
    assert (
        answers == {str(i) for i in range(10)}
        if "test" in parts
        else answers < {str(i) for i in range(1, 61)}
    )


def test_rows_of_the_own_set_are_tokenized_as_training(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "own.jsonl", PAIRS)
    _, prepared = prepare_sums(tmp_path, validation_dataset=path)
    assert prepared.validation is not None
    trained = {prepared.train.example(i)[0].tobytes() for i in range(prepared.train.num_examples)}
    held = [prepared.validation.example(i)[0].tobytes() for i in range(prepared.validation.num_examples)]
    assert len(held) == 20 and 8 <= sum(ids in trained for ids in held) <= 10


def test_rows_of_the_training_set_are_counted_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(tmp_path / "own.jsonl", PAIRS)
    settings = {"validation_dataset": path, "test_dataset": path}
    for _ in range(2):  # the second time they are found prepared
        caplog.clear()
        _, prepared = prepare_sums(tmp_path, **settings)
        assert prepared.stats.overlap == {"validation": 10, "test": 10}
        assert [len(read_set(prepared, name)) for name in SETS] == [60, 20, 20]
        for name in ("validation", "test"):
            assert f"10 of the 20 {name} rows are in the training set too" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        _, prepared = prepare_sums(tmp_path, validation_dataset=write_rows(tmp_path / "b.jsonl", PAIRS[10:]))
    assert prepared.stats.overlap == {"validation": 0}
    assert "none of the 10 validation rows is in the training set" in caplog.text


def test_another_split_of_the_same_folder_is_validated_or_tested_on(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, number in (("train", 40), ("validation", 7), ("test", 5)):
        write_rows(folder / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(number)])
    config = TrainConfig(
        dataset_name=str(folder), validation_split="validation", test_split="test", num_proc=1
    )
    prepared = prepare(config, build_tokenizer("byte_bpe"), tmp_path / "datasets")
    for name, split, number in (
        ("training", "train", 40),
        ("validation", "validation", 7),
        ("test", "test", 5),
    ):
        assert [row["output"] for row in rows_of(prepared, name)] == [f"{split} {i}" for i in range(number)]
    # And a set of one's own has splits too: the one of the part, or the one that is named.
    other = {"dataset_name": write_rows(tmp_path / "a.jsonl", [{"text": "a"}] * 3), "num_proc": 1}
    for changes, text in (({}, "validation 0"), ({"validation_split": "test"}, "test 0")):
        config = TrainConfig(**other, validation_dataset=str(folder), **changes)
        prepared = prepare(config, build_tokenizer("byte_bpe"), tmp_path / "datasets")
        assert rows_of(prepared, "validation")[0]["output"] == text


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"validation_split": "validation"}, "which is one file and has none", "--validation_dataset"),
        ({"test_split": "train"}, "which is one file and has none", "--test_dataset"),
        (
            {"validation_dataset": "absent.jsonl"},
            "the validation set: no such file",
            "validation_dataset names",
        ),
        (
            {"test_dataset": "{folder}/odd.jsonl"},
            "the test set: no way to read the rows of `odd.jsonl`",
            "odd",
        ),
        (
            {"dataset_name": "{folder}/set", "test_split": "train"},
            "`test_split` is `train`, which is trained on",
            "another",
        ),
    ],
)
def test_what_can_t_be_a_set_of_one_s_own_is_refused(
    changes: dict[str, str], message: str, hint: str, tmp_path: Path
) -> None:
    write_rows(tmp_path / "odd.jsonl", [{"odd": "column"}])
    (tmp_path / "set").mkdir()
    settings = {"dataset_name": write_rows(tmp_path / "set" / "sums.jsonl", PAIRS), **changes}
    config = TrainConfig(
        **{name: value.format(folder=tmp_path) for name, value in settings.items()}, num_proc=1
    )
    with pytest.raises(DataError) as caught:
        prepare(config, build_tokenizer("byte_bpe"), tmp_path / "datasets")
    assert message in caught.value.message and hint in str(caught.value.hint)
    assert not (tmp_path / "datasets").exists()


@pytest.mark.parametrize(
    ("names", "split", "other"),
    [
        (("train", "dev"), "train", "training"),
        (("train", "dev"), "train", "Train"),
        (("train", "dev"), "TRAIN", "train"),
        (("a", "b"), "train", "b"),
    ],
)
def test_what_is_trained_on_is_refused_by_any_name(
    names: tuple[str, ...], split: str, other: str, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in names:
        write_rows(folder / f"{name}.jsonl", [{"text": name}])
    config = TrainConfig(dataset_name=str(folder), split=split, validation_split=other)
    with pytest.raises(
        DataError, match=f"`validation_split` is `{other}`, which is trained on: `.*jsonl` holds"
    ):
        check_sources(config)


def test_a_saved_set_without_splits_is_not_validated_on_too(tmp_path: Path) -> None:
    Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "saved"))
    config = TrainConfig(dataset_name=str(tmp_path / "saved"), validation_split="validation")
    with pytest.raises(DataError, match="`validation_split` is `validation`, which is trained on"):
        check_sources(config)


def test_another_split_may_lie_in_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": [{"text": "a"}], "val": [{"text": "b"}]}))
    config = TrainConfig(dataset_name=str(path), validation_split="validation", num_proc=1)
    prepared = prepare(config, build_tokenizer("byte_bpe"), tmp_path / "datasets")
    assert [[row["output"] for row in rows_of(prepared, name)] for name in SETS] == [["a"], ["b"], []]
    with pytest.raises(DataError, match="`validation_split` is `training`, which is trained on"):
        check_sources(TrainConfig(dataset_name=str(path), validation_split="training"))


def test_each_of_several_data_sets_has_its_own(tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", [{"q": f"own {i}? ", "a": "yes"} for i in range(6)])
    config, split = prepare_both(tmp_path)
    assert config.datasets is not None
    sums = config.datasets[0].model_copy(update={"validation_dataset": held})
    config = config.model_copy(update={"datasets": [sums, config.datasets[1]]})
    prepared = prepare(config, build_tokenizer("chatml"), tmp_path / "datasets")
    assert prepared.row_format == ["template", "messages", "template"]
    by_set = [[dataset_of(row) for row in read_set(prepared, name)] for name in SETS]
    chat = [[dataset_of(row) for row in read_set(split, name)].count(1) for name in SETS]
    assert [ids.count(1) for ids in by_set] == chat
    assert [ids.count(2) for ids in by_set] == [0, 6, 0]
    assert by_set[0].count(0) == 54 and by_set[1].count(0) == 0
    assert len(CHAT) == sum(chat)


def test_an_error_of_a_row_names_the_own_set(tmp_path: Path) -> None:
    rows = json.loads(json.dumps(CHAT))
    rows[30]["messages"][0]["role"] = "critic"
    config = TrainConfig(
        dataset_name=write_rows(tmp_path / "chat.jsonl", CHAT),
        validation_dataset=write_rows(tmp_path / "own.jsonl", rows),
        num_proc=1,
    )
    with pytest.raises(DataError, match=r"own.jsonl`, line 31"):
        prepare(config, build_tokenizer("qwen3"), tmp_path / "datasets")


def test_templates_that_were_given_fill_the_own_set_too(tmp_path: Path) -> None:
    config = TrainConfig(
        dataset_name=write_rows(tmp_path / "sums.jsonl", SUMS),
        test_dataset=write_rows(tmp_path / "own.jsonl", PAIRS),
        num_proc=1,
        **SUM_TEMPLATES,
    )
    with pytest.raises(DataError, match=r"the test set: `(in|out)put_template` has the placeholder"):
        prepare(config, build_tokenizer("byte_bpe"), tmp_path / "datasets")


def test_one_set_stands_in_place_of_a_part_of_all_data_sets(tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", PAIRS)
    config, split = prepare_both(tmp_path)
    _, prepared = prepare_both(tmp_path, validation_dataset=held)
    assert prepared.row_format == ["template", "messages", "prompt_completion"]
    by_set = [[dataset_of(row) for row in read_set(prepared, name)] for name in SETS]
    assert set(by_set[1]) == {2} and len(by_set[1]) == len(PAIRS)
    assert read_set(prepared, "test") == read_set(split, "test")
    assert len(by_set[0]) == len(read_set(split, "training")) + len(read_set(split, "validation"))
    assert config.datasets is not None
    with pytest.raises(ValueError, match="`validation_split` is of one data set"):
        prepare_both(tmp_path, validation_split="validation")
    element = {"dataset_name": held, "validation_dataset": held}
    with pytest.raises(ValueError, match="put validation_dataset into the elements"):
        TrainConfig(datasets=[element, element], validation_dataset=held)


def test_a_set_beside_several_is_read_as_they_agree(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    names = [str(write_rows(tmp_path / f"{name}.jsonl", [talk] * 4)) for name in ("a", "b", "held")]
    both = {"system_prompt": "Be brief.", "train_on": "last_assistant_turn"}
    config = TrainConfig(
        datasets=[{"dataset_name": names[0], **both}, {"dataset_name": names[1], **both, "weight": 2.0}],
        validation_dataset=names[2],
        max_seq_length=64,
        num_proc=1,
    )
    prepared = prepare(config, build_tokenizer("chatml"), tmp_path / "sets")
    held = json.loads((prepared.data_dir / "validation.jsonl").read_text().splitlines()[0])
    assert held["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("element", [{}, {"weight": 2.0}, {"name": "a"}])
def test_a_data_set_of_several_has_to_be_named(element: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="names no data set in its element 1"):
        TrainConfig(datasets=[{"dataset_name": "a.jsonl"}, element])


def test_a_key_twice_is_refused_on_the_command_line_too() -> None:
    for name, text in (
        ("datasets", '[{"dataset_name": "a", "dataset_name": "b"}]'),
        ("field_mapping", '{"instruction": "q", "instruction": "a"}'),
    ):
        with pytest.raises(ConfigError, match=name):
            load_settings(TrainConfig, None, {name: text}, {})
