"""What `inspect` prints: examples with their trained tokens marked, and the figures of the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from support.tokenizers import TOKENIZER_KINDS, build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.data.encode import TextEncoder
from tunesmith.data.formats.template import mark_completion
from tunesmith.view.inspect import inspect, mark_trained


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_for(tmp_path: Path, kind: str, rows: list[dict[str, Any]], **given_settings: Any) -> TrainConfig:
    build_tokenizer(kind).save_pretrained(tmp_path / "model")
    LlamaConfig().save_pretrained(tmp_path / "model")
    source = write_rows(tmp_path / "rows.jsonl", rows)
    return TrainConfig(dataset_name=str(source), model_path=tmp_path / "model", **given_settings)


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZER_KINDS if kind != "wordpiece"])
def test_trained_tokens_are_marked_without_colour(kind: str) -> None:
    tokenizer = build_tokenizer(kind)
    encoder = TextEncoder(tokenizer)
    (example,) = encoder.encode(mark_completion({"input": "Add 1\nand 2: ", "output": "three"}))
    marked = mark_trained(tokenizer, np.array(example.input_ids), np.array(example.trained)).plain
    assert marked.count("⟦") == 1
    assert marked.endswith(f"⟦three{tokenizer.eos_token}⟧") or marked.endswith(
        f"⟦ three{tokenizer.eos_token}⟧"
    )


def test_inspect_prints_examples_lengths_counts_and_overlap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"Say {i}.", "input": "", "output": "word " * (i % 7 + 1)} for i in range(96)]
    rows += [{**rows[0], "output": rows[0]["output"].upper()}, rows[1]]
    rows += [{"instruction": "long " * 60, "input": "", "output": "x"}, {**rows[3], "output": "word " * 90}]
    config = config_for(tmp_path, "byte_bpe", rows, max_seq_length=64)
    inspect(config, num_examples=2)
    printed = capsys.readouterr().out
    assert "rows are read as template, because the columns fill the default templates" in printed
    assert "⟦### Response:↵" in printed
    assert "<|endoftext|>⟧" in printed
    assert printed.count(" trained ─") == 2
    assert "█" in printed
    assert "packing efficiency" in printed
    assert "duplicates: 2 of 100 rows" in printed
    assert "test rows are in the training set too" in printed
    assert not (tmp_path / "runs").exists()


def test_inspect_prepares_under_a_given_home_and_leaves_data_dir_alone(tmp_path: Path) -> None:
    rows = [{"text": f"word {i}"} for i in range(20)]
    config = config_for(tmp_path, "byte_bpe", rows, home=tmp_path / "home", data_dir=tmp_path / "sets")
    inspect(config)
    assert list((tmp_path / "home" / "datasets").glob("*/training.jsonl"))
    assert not (tmp_path / "sets").exists()


def test_inspect_counts_rows_shared_by_training_and_test_when_case_is_folded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"item {i}" for i in range(200)]
    rows = [{"text": text} for word in words for text in (word, word.upper())]
    inspect(config_for(tmp_path, "byte_bpe", rows, train_split_ratio=0.5))
    printed = capsys.readouterr().out
    assert "duplicates: 200 of 400 rows" in printed
    shared = int(printed.split("overlap: ")[2].split(" of 100 test rows")[0])
    assert 20 <= shared <= 80


def test_inspect_shows_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}] * 2
    inspect(config_for(tmp_path, "chatml", [{"messages": turns}], train_split_ratio=1.0))
    printed = capsys.readouterr().out
    assert printed.count("⟦Hello<|im_end|>⟧") == 2
    assert "rows are read as messages" in printed


def test_inspect_shows_what_an_epoch_takes_of_each_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = config_for(tmp_path, "byte_bpe", [{"text": "abc"}] * 30)
    second = write_rows(tmp_path / "more.jsonl", [{"text": "def", "user": i % 5} for i in range(30)])
    held = write_rows(tmp_path / "held.jsonl", [{"text": "def"}, {"text": "ghi"}])
    whole = {"train_split_ratio": 1.0}
    data_sets = [
        {"dataset_name": first.dataset_name, "name": "letters", "weight": 0.5, **whole},
        {"dataset_name": str(second), "max_rows": 20, "group_by": "user", **whole},
    ]
    inspect(TrainConfig(datasets=data_sets, model_path=first.model_path, validation_dataset=str(held)))
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    letters, more = (next(row for row in rows if row[:1] == [name]) for name in ("letters", "more"))
    assert letters[1:5] == ["0.5", "15", "42.9", "%"]
    assert more[1:5] == ["1", "20", "57.1", "%"]
    assert "letters, `rows.jsonl` (train): rows are read as text" in printed
    assert "`more.jsonl` (train): 20 of its 30 rows, by max_rows" in printed
    assert "`more.jsonl` (train): 5 groups of rows by `user`" in printed
    assert "overlap: 1 of 2 validation rows are in the training set too (50.0 %)" in printed


def test_inspect_of_a_single_data_set_tells_no_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(config_for(tmp_path, "byte_bpe", [{"text": f"row {i}"} for i in range(10)]))
    assert "what an epoch takes" not in capsys.readouterr().out


def test_inspect_spells_out_what_a_terminal_would_obey(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "red \x1b[31m turned \u202e back\r again [bold]"}]
    inspect(config_for(tmp_path, "byte_bpe", rows, train_split_ratio=1.0))
    printed = capsys.readouterr().out
    assert " \\x1b[31m turned \\u202e back\\x0d again [bold]" in printed
    assert not {"\x1b", "\u202e", "\r"} & set(printed)
