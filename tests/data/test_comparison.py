"""Rows compared with one another, and what became of single ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.tokenizers import build_tokenizer
from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.data.comparison import (
    are_repeated,
    are_shared,
    count_repeats,
    find_in_rows,
    hash_rows,
    hash_sets,
)
from tunesmith.data.fates import find_fates
from tunesmith.data.fit import choose_limits
from tunesmith.data.formats import format_named
from tunesmith.data.prepare import prepare
from tunesmith.data.split import check_sources


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(question: str, answer: str, **extra: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question, **extra}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def test_rows_are_compared_by_what_they_say(tmp_path: Path) -> None:
    rows = [chat("Hi", "You"), chat("Hi", "You", id=7), chat(" hi", "YOU"), chat("You", "Hi")]
    formats = [format_named("messages", HFDatasetConfig(dataset_name="x"))]
    hashes = hash_rows(write(tmp_path / "rows.jsonl", rows), formats)
    assert are_repeated(hashes.equal).tolist() == [True, True, False, False]
    assert are_repeated(hashes.alike).tolist() == [True, True, True, False]
    assert (count_repeats([hashes.equal]), count_repeats([hashes.alike])) == (1, 2)
    other = hash_rows(write(tmp_path / "other.jsonl", [rows[1]]), formats)
    assert are_shared(hashes.equal, [other.equal]).tolist() == [True, True, False, False]
    empty = hash_rows(write(tmp_path / "none.jsonl", []), formats)
    assert len(empty) == 0 and are_shared(hashes.equal, [empty.equal]).tolist() == [False] * 4


def test_rows_are_found_in_a_file_whole_or_by_what_they_ask(tmp_path: Path) -> None:
    messages, texts = (
        format_named(name, HFDatasetConfig(dataset_name="x")) for name in ("messages", "template")
    )
    longer = {"messages": [*chat("Hi", "You")["messages"], *chat("And?", "Me")["messages"]]}
    written = [
        {**longer, "dataset_id": 0},
        {**chat("Who?", "Me"), "dataset_id": 0},
        {"input": "2 + 2?", "output": "4", "dataset_id": 1},
    ]
    rows_file = write(tmp_path / "training.jsonl", written)
    asked = {
        0: longer,
        1: chat(" hi ", "otherwise"),
        2: chat("And?", "Me"),  # asked behind something else
        3: chat("WHO?", "me", id=3),
        4: chat("Nobody?", "No"),
    }
    found = find_in_rows(asked, [messages], rows_file, [messages, texts])
    assert found == {0: "row", 1: "prompt", 3: "row"}
    sums = {0: {"input": "2 + 2?", "output": "4"}, 1: {"input": "2 +  2?\n", "output": "5"}}
    assert find_in_rows(sums, [texts], rows_file, [messages, texts]) == {0: "row", 1: "prompt"}


def test_rows_of_several_data_sets_are_compared_across_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", [{"text": f"word {i}"} for i in range(30)])
    sources = [{"dataset_name": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b")]
    config = TrainConfig(datasets=sources)  # type: ignore[arg-type]
    prepared = prepare(config, build_tokenizer("byte_bpe"), tmp_path / "sets")
    hashes = hash_sets(prepared.data_dir, check_sources(config))
    everything = [of_set.equal for of_set in hashes.values()]
    assert sum(map(len, everything)) == 60 and count_repeats(everything) == 30
    assert [np.bincount(of_set.dataset_ids).tolist() for of_set in hashes.values() if len(of_set)] == [
        [len(of_set) // 2] * 2 for of_set in hashes.values() if len(of_set)
    ]
    assert not are_shared(hashes["test"].equal, [hashes["training"].equal]).any()


# Qwen3's template writes a think block into an empty answer.
@pytest.mark.parametrize("kind", ["chatml", "qwen3"])
def test_what_became_of_each_row_adds_up_to_what_became_of_all(tmp_path: Path, kind: str) -> None:
    rows = [chat("short", "word " * i) for i in range(1, 60)]
    rows += [
        chat("word " * 80, "lost"),
        chat("no answer", ""),
        {"messages": [{"role": "user", "content": "Hm"}]},
    ]
    rows += [{"messages": [*chat("one", "two")["messages"], *chat("word " * 20, "word " * 20)["messages"]]}]
    source = write(tmp_path / "rows.jsonl", rows)
    config = TrainConfig(dataset_name=str(source), train_split_ratio=1.0, max_seq_length=64)
    tokenizer = build_tokenizer(kind)
    prepared = prepare(config, tokenizer, tmp_path / "sets")
    formats = [row_format.with_tokenizer(tokenizer, "2026-01-31") for row_format in check_sources(config)]
    limits = choose_limits(config, formats)
    fates = find_fates(prepared.data_dir / "training.jsonl", range(len(rows)), formats, limits)
    stats, counts = prepared.stats.train, [fate.counts for fate in fates.values()]
    assert stats.truncated == sum(it.truncated for it in counts) > 0
    assert stats.dropped == sum(it.dropped for it in counts) >= 2
    assert stats.untrained == sum(it.untrained for it in counts) == 2
    for example in range(prepared.train.num_examples):
        ids, _ = prepared.train.example(example)
        whole = [it.segments[0].input_ids for it in fates[int(prepared.train.rows[example])].examples]
        assert any(it[: len(ids)] == ids.tolist() for it in whole)
    few = find_fates(prepared.data_dir / "training.jsonl", [5, 60], formats, limits)
    assert list(few) == [5, 60] and few[60].rendered["messages"][0]["content"] == "no answer"
