"""Rows that are longer than a sequence: what is split, cut and lost of them, and what the log says of it."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from support.tokenizers import TOKENIZER_KINDS, build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.data import token_files
from tunesmith.data.batches import Sequences
from tunesmith.data.concatenation import cut_at_pack_ends
from tunesmith.data.examples import Example, Segment
from tunesmith.data.fit import Counts, Limits, fit
from tunesmith.data.prepare import Prepared, open_prepared, prepare
from tunesmith.data.token_arrays import SetStats
from tunesmith.data.token_set import TokenSet
from tunesmith.errors import DataError
from tunesmith.view.inspect import inspect

LONG = {"text": " ".join(f"w{i}" for i in range(400))}
SHORT = [{"text": f"short {i}"} for i in range(99)]
QUESTION = {"role": "user", "content": "hi"}
CHAT = {
    "messages": [
        QUESTION,
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "w " * 300},
        {"role": "assistant", "content": "LAST ANSWER"},
    ]
}


def config_of(folder: Path, rows: Iterable[dict[str, Any]], **given_settings: Any) -> TrainConfig:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {"train_split_ratio": 1.0, "max_seq_length": 64, "num_proc": 1}
    return TrainConfig(dataset_name=str(source), **{**defaults, **given_settings})


def prepare_rows(
    folder: Path, rows: Iterable[dict[str, Any]], kind: str = "byte_bpe", **given_settings: Any
) -> Prepared:
    return prepare(config_of(folder, rows, **given_settings), build_tokenizer(kind), folder / "datasets")


def examples_of(tokens: TokenSet) -> list[tuple[list[int], list[bool]]]:
    examples = [tokens.example(i) for i in range(tokens.num_examples)]
    return [(ids.tolist(), trained.tolist()) for ids, trained in examples]


def trained_pairs(tokens: TokenSet) -> list[tuple[int, int, int]]:
    """Return each trained token with the row it is from and the token that predicts it, sorted."""
    return sorted(
        (int(row), before, after)
        for row, (ids, trained) in zip(tokens.rows, examples_of(tokens), strict=True)
        for before, after, is_trained in zip(ids, ids[1:], trained[1:], strict=False)
        if is_trained
    )


# Windows.


def spans_up_to(length: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    borders = st.lists(st.integers(1, length), min_size=2, max_size=8, unique=True).map(sorted)
    return borders.map(lambda found: list(zip(found[::2], found[1::2], strict=False)))


@given(st.integers(3, 90).flatmap(lambda n: st.tuples(st.just(n), spans_up_to(n))), st.integers(2, 20))
@example((21, [(1, 21)]), 6)
@example((11, [(1, 10), (10, 11)]), 2)
def test_every_trained_token_is_trained_in_one_window(
    drawn: tuple[int, list[tuple[int, int]]], limit: int
) -> None:
    length, spans = drawn
    counts = Counts()
    # Each token is its own place in the text.
    windows = fit(Example((Segment(list(range(length)), spans),)), Limits(limit, ["split"]), counts)
    trained = [token for ids, inside in windows for a, b in inside for token in ids[a:b]]
    assert trained == [token for a, b in spans for token in range(a, b)]
    for ids, inside in windows:
        assert 2 <= len(ids) <= limit
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert all(1 <= a < b <= len(ids) for a, b in inside)
    assert counts == (Counts(split=1, windows=len(windows)) if spans[-1][1] > limit else Counts())


def test_windows_are_full_but_the_last_and_share_one_token() -> None:
    text = Example((Segment(list(range(100, 111)), [(1, 10), (10, 11)]),))
    windows = fit(text, Limits(5, ["split"]), Counts())
    assert windows == [
        Segment([100, 101, 102, 103, 104], [(1, 5)]),
        Segment([104, 105, 106, 107, 108], [(1, 5)]),
        Segment([108, 109, 110], [(1, 2), (2, 3)]),
    ]
    assert len(fit(text, Limits(6, ["split"]), Counts())) == 2  # a third would hold no token of its own


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_the_windows_of_a_row_are_its_tokens_and_only_the_last_ends(kind: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(kind)
    tokens = prepare_rows(tmp_path, [SHORT[0], LONG, SHORT[1]], kind).train
    expected, _ = examples_of(prepare_whole(tmp_path, kind))[0]
    assert tokens.rows.tolist() == [0, *[1] * (tokens.num_examples - 2), 2]
    windows = examples_of(tokens)[1:-1]
    assert [len(ids) for ids, _ in windows[:-1]] == [64] * (len(windows) - 1)
    assert all(trained == [False] + [True] * (len(ids) - 1) for ids, trained in windows)
    rebuilt = [windows[0][0][0], *(token for ids, _ in windows for token in ids[1:])]
    assert rebuilt == expected
    assert [tokenizer.eos_token_id in ids for ids, _ in windows] == [False] * (len(windows) - 1) + [True]
    if tokenizer.bos_token_id is not None:
        begins = expected[0] == tokenizer.bos_token_id
        assert [tokenizer.bos_token_id in ids for ids, _ in windows] == [begins] + [False] * (
            len(windows) - 1
        )


def prepare_whole(folder: Path, kind: str) -> TokenSet:
    return prepare_rows(folder, [LONG], kind, max_seq_length=10_000).train


def test_a_long_text_is_split_or_truncated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tunesmith")
    num_tokens = len(prepare_whole(tmp_path, "byte_bpe").example(0)[0])
    stats = prepare_rows(tmp_path, [LONG, *SHORT]).stats.train
    num_windows = -(-(num_tokens - 1) // 63)
    assert (stats.split, stats.windows, stats.examples) == (1, num_windows, num_windows + 99)
    assert (stats.truncated, stats.lost_tokens) == (0, 0)
    assert f"1 text longer than max_seq_length (64 tokens): split into {num_windows} windows" in caplog.text
    assert "lost" not in caplog.text

    caplog.clear()
    cut = prepare_rows(tmp_path, [LONG, *SHORT], long_text="truncate").stats.train
    assert (cut.split, cut.windows, cut.examples, cut.truncated) == (0, 0, 100, 1)
    assert cut.lost_tokens == num_tokens - 64
    share = 100 * cut.lost_tokens / (cut.tokens + cut.lost_tokens)
    assert share > 60
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == (
        f"{num_tokens - 64:,} tokens ({share:.1f} %) lost beyond max_seq_length (64 tokens): 1 example truncated"
    )


def test_the_validation_set_is_split_as_the_training_set(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + LONG["text"]} for i in range(8)]
    prepared = prepare_rows(tmp_path, rows, train_split_ratio=0.5, val_test_split_ratio=0.0)
    assert prepared.validation is not None and prepared.stats.validation is not None
    assert prepared.stats.validation.split == prepared.stats.validation.rows == 4
    assert sorted(set(prepared.validation.rows.tolist())) == [0, 1, 2, 3]
    assert prepared.validation.num_examples == prepared.stats.validation.windows > 40


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_several_processes_split_and_count_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_ROWS_PER_PROCESS", 50)
    rows = [*SHORT[:9], LONG, *SHORT, LONG]
    found = []
    for num_proc in (1, 2):
        folder = tmp_path / str(num_proc)
        folder.mkdir()
        prepared = prepare_rows(folder, rows, num_proc=num_proc)
        found.append((prepared.stats, examples_of(prepared.train), prepared.train.rows.tolist()))
    assert found[0] == found[1]
    assert found[0][0].train.split == 2


# What is lost.


def test_a_long_answer_s_lost_tokens_are_told(tmp_path: Path) -> None:
    answer = "x y z " * 40
    row = {"prompt": "Say it: ", "completion": answer}
    stats = prepare_rows(tmp_path, [row]).stats.train
    whole = prepare_rows(tmp_path, [row], max_seq_length=10_000).stats.train
    assert (stats.truncated, stats.tokens, stats.lost_tokens) == (1, 64, whole.tokens - 64)
    assert stats.lost_answers == 0  # its beginning is trained


def test_rows_dropped_because_their_prompts_are_too_long_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "Say it: " * 100, "completion": "x"},
        {"prompt": "Hi ", "completion": "x"},
        {"prompt": "Hi ", "completion": ""},
    ]
    stats = prepare_rows(tmp_path, rows).stats.train
    assert (stats.dropped, stats.untrained, stats.long_prompts, stats.over_long) == (2, 1, 1, 0)
    lost = prepare_rows(tmp_path, rows[:1], max_seq_length=10_000).stats.train.tokens
    assert (stats.lost_tokens, stats.lost_answers) == (lost, 1)
    assert "1 example dropped because the prompt alone fills it, 1 answer lost whole" in caplog.text


def test_the_answers_that_a_conversation_loses_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stats = prepare_rows(tmp_path, [CHAT], "chatml").stats.train
    whole = prepare_rows(tmp_path, [CHAT], "chatml", max_seq_length=1000).stats.train
    assert (stats.truncated, stats.dropped, stats.lost_answers) == (1, 0, 1)
    assert stats.lost_tokens == whole.tokens - stats.tokens
    assert whole.lost_tokens == whole.lost_answers == 0
    assert "1 example truncated, 1 answer lost whole" in caplog.text


def test_untrained_tokens_at_the_end_count_as_neither_cut_nor_lost(tmp_path: Path) -> None:
    row = {"messages": [*CHAT["messages"][:2], *[{"role": "user", "content": "w " * 300}] * 2]}
    stats = prepare_rows(tmp_path, [row], "chatml", long_examples="drop").stats.train
    assert (stats.examples, stats.truncated, stats.lost_tokens, stats.lost_answers) == (1, 0, 0, 0)


def test_long_examples_are_truncated_or_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "Hi ", "completion": "x " * n} for n in (3, 100, 4)]
    rows.append({"prompt": "Hi " * 100, "completion": "x"})
    kept = prepare_rows(tmp_path, rows).stats.train
    assert (kept.examples, kept.truncated, kept.dropped, kept.over_long) == (3, 1, 1, 0)
    stats = prepare_rows(tmp_path, rows, long_examples="drop").stats.train
    assert (stats.examples, stats.truncated, stats.dropped) == (2, 0, 2)
    assert (stats.over_long, stats.long_prompts, stats.lost_answers) == (1, 1, 2)
    assert stats.lost_tokens == kept.lost_tokens + 64
    assert "1 example dropped because long_examples is drop" in caplog.text
    with pytest.raises(DataError, match=r"longer than max_seq_length \(64\), and long_examples is drop"):
        prepare_rows(tmp_path, rows[1:2], long_examples="drop")


def test_each_of_several_data_sets_has_its_own_way(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(json.dumps(LONG))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Hi ", "completion": "x " * 100}))
    sets = [{"dataset_name": str(tmp_path / f"{name}.jsonl"), "train_split_ratio": 1} for name in ("pairs", "texts")]  # fmt: skip
    config = TrainConfig(datasets=sets, max_seq_length=64, num_proc=1)
    prepared = prepare(config, build_tokenizer("byte_bpe"), tmp_path / "datasets")
    stats = prepared.stats.train
    assert (stats.truncated, stats.split) == (1, 1)
    assert prepared.train.dataset_ids.tolist() == [0, *[1] * stats.windows]


def test_inspect_shows_what_is_split_and_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_tokenizer("chatml").save_pretrained(tmp_path / "model")
    LlamaConfig().save_pretrained(tmp_path / "model")
    inspect(config_of(tmp_path, [CHAT, {"messages": [{**QUESTION, "content": "w " * 300}, CHAT["messages"][1]]}],
                      model_path=tmp_path / "model"))  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    assert "prompt alone too long 1" in printed
    assert "answers lost 2" in printed
    assert "texts split" not in printed
    inspect(config_of(tmp_path, [LONG], model_path=tmp_path / "model"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "texts split 1" in printed
    assert "lost for their length 0 (0.0 %)" in printed


# Concatenation.


trained_examples = st.integers(2, 50).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))


@settings(max_examples=200, deadline=None)
@given(st.lists(trained_examples, max_size=60), st.integers(2, 60), st.integers(0, 3))
@example([(5, 1)], 3, 0)
@example([(10, 4), (10, 9), (10, 1)], 10, 0)
@example([(2, 1), (2, 1), (2, 1)], 3, 0)
@example([(9, 8), (9, 8)], 4, 0)
def test_pieces_fill_their_packs_and_hold_every_trained_token_once(
    drawn: list[tuple[int, int]], capacity: int, seed: int
) -> None:
    lengths, first_trained = np.array(drawn, dtype=np.int32).reshape(-1, 2).T
    pieces = cut_at_pack_ends(lengths, first_trained, capacity, seed)
    sizes = [int(pieces.lengths[start:end].sum()) for start, end in pieces.bounds]
    assert sizes[:-1] == [capacity] * (len(sizes) - 1)
    assert all(0 < size <= capacity for size in sizes)
    borders = [0, *pieces.bounds[:, 1].tolist()]
    assert pieces.bounds.tolist() == [list(pair) for pair in pairwise(borders)]
    assert borders[-1] == len(pieces.examples)
    cut = list(zip(pieces.examples.tolist(), pieces.starts.tolist(), pieces.lengths.tolist(), strict=True))
    trained = [(i, t) for i, start, length in cut for t in range(start + 1, start + length) if t >= first_trained[i]]  # fmt: skip
    assert sorted(trained) == [(i, t) for i, (length, first) in enumerate(drawn) for t in range(first, length)]  # fmt: skip
    for i, start, length in cut:
        # An example's first trained token sees all that is before it.
        if lengths.max() <= capacity and start < first_trained[i] < start + length:
            assert start == 0
    again = cut_at_pack_ends(lengths, first_trained, capacity, seed)
    assert cut == list(zip(again.examples.tolist(), again.starts.tolist(), again.lengths.tolist(), strict=True))  # fmt: skip


ROWS = {
    "text": ("llama2", [LONG, *SHORT]),
    "prompt_completion": ("byte_bpe", [{"prompt": f"{i}? " * (i % 9 + 1), "completion": "so " * (i % 7 + 1)} for i in range(99)]),
    "messages": ("chatml", [{"messages": [*CHAT["messages"][:2], {**QUESTION, "content": f"{i}"}, {"role": "assistant", "content": "so " * (i % 9 + 1)}]} for i in range(60)]),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_concatenated_packs_are_full_and_every_token_is_trained_once(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tunesmith")
    kind, rows = ROWS[name]
    whole = prepare_rows(tmp_path, rows, kind, max_seq_length=10_000).train
    prepared = prepare_rows(tmp_path, rows, kind, concatenate=True)
    tokens, stats = prepared.train, prepared.stats.train
    assert prepared.row_format == name
    sizes = [int(tokens.lengths[pack].sum()) for pack in tokens.packs]
    assert sizes[:-1] == [64] * (len(sizes) - 1)
    assert stats.packing_efficiency == sum(sizes) / (64 * len(sizes))
    assert trained_pairs(tokens) == trained_pairs(whole)
    found = examples_of(tokens)
    assert [len(ids) for ids, _ in found] == tokens.lengths.tolist()
    assert [sum(trained) for _, trained in found] == tokens.num_trained.tolist()
    assert not any(trained[0] for _, trained in found)
    assert stats.trained_tokens == whole.num_trained.sum()
    assert stats.lost_tokens == stats.split == 0
    parts = Counter(
        record
        for (record, _), (_, trained) in zip(tokens.pieces.tolist(), found, strict=True)
        if any(trained)
    )
    assert stats.cut == sum(number > 1 for number in parts.values()) > 0
    assert stats.untrained_pieces == sum(not any(trained) for _, trained in found)
    cut = "1 example" if stats.cut == 1 else f"{stats.cut} examples"
    assert f"concatenate: {cut} cut where a pack ends" in caplog.text

    batch = Sequences(tokens, True, 0).collate(np.arange(len(sizes)))
    assert len(batch.targets_N) == stats.trained_tokens
    assert (batch.position_ids_BT == 0).sum() == tokens.num_examples + (
        sizes[-1] < 64 and len(tokens.packs[-1]) > 1
    )


def test_concatenation_follows_the_seed_and_is_found_again(tmp_path: Path) -> None:
    first = prepare_rows(tmp_path, [LONG, *SHORT], concatenate=True)
    again = prepare_rows(tmp_path, [LONG, *SHORT], concatenate=True)
    plain = prepare_rows(tmp_path, [LONG, *SHORT])
    assert again.folder == first.folder != plain.folder
    assert again.stats == first.stats
    other = prepare_rows(tmp_path, [LONG, *SHORT], concatenate=True, seed=1)
    assert examples_of(other.train) != examples_of(first.train)


def test_long_examples_of_conversations_are_not_joined_by_concatenation(tmp_path: Path) -> None:
    stats = prepare_rows(tmp_path, [CHAT, *ROWS["messages"][1]], "chatml", concatenate=True).stats.train
    assert (stats.truncated, stats.lost_answers) == (1, 1)


def test_concatenation_without_packing_is_refused() -> None:
    with pytest.raises(ValueError, match="concatenate fills packed sequences"):
        TrainConfig(concatenate=True, packing=False)


# What was prepared before.


def test_tokens_that_an_older_version_prepared_are_found_and_their_counts_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi ", "completion": "x"}, {"prompt": "Hi " * 100, "completion": "x"}]
    prepared = prepare_rows(tmp_path, rows)
    named = prepare_rows(tmp_path, rows, long_text="split", long_examples="truncate", concatenate=False)
    assert named.folder == prepared.folder
    for changed in ({"long_text": "truncate"}, {"long_examples": "drop"}, {"concatenate": True}):
        assert prepare_rows(tmp_path, rows, **changed).folder != prepared.folder
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    first = ("rows", "examples", "truncated", "dropped", "untrained", "tokens", "trained_tokens", "packs",
             "packing_efficiency", "longest")  # fmt: skip
    for name, stats in manifest["stats"].items():
        manifest["stats"][name] = {key: stats[key] for key in first}
    (prepared.folder / "manifest.json").write_text(json.dumps(manifest))
    stats = open_prepared(prepared.folder).stats.train
    assert stats == SetStats(**{key: getattr(prepared.stats.train, key) for key in first})
    assert stats.long_prompts == 1
