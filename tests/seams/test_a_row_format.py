"""A new row format is one object: rows of a question with a good and a bad answer, each example a pair of segments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from support.runs import ending_of, losses, small_config, start, train_here
from support.tokenizers import build_tokenizer
from tunesmith.config import HFDatasetConfig
from tunesmith.data import formats
from tunesmith.data.batches import BatchPlan, GlobalBatch, Sequences
from tunesmith.data.encode import MarkedText, TextEncoder
from tunesmith.data.examples import Example
from tunesmith.data.formats import Findings, Prompt, RenderedRow
from tunesmith.data.formats.base import ColumnsFormat
from tunesmith.data.prepare import open_prepared
from tunesmith.data.token_set import TokenSet
from tunesmith.errors import ConfigError
from tunesmith.train.worker import TrainJob

SIDES = ("good", "bad")
MAX_SEQ_LENGTH = 24


@dataclass(frozen=True)
class PairFormat(ColumnsFormat):
    name = "pair"
    num_segments = 2
    why: str = "there are columns `good` and `bad`"
    encoder: TextEncoder | None = None

    @classmethod
    def choose(cls, settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> Self | None:
        return cls() if set(SIDES) <= set(first) else None

    @classmethod
    def from_settings(cls, settings: HFDatasetConfig) -> Self:
        return cls()

    def identity(self) -> str:
        return json.dumps([self.name, []])

    def render(self, row: Mapping[str, Any], where: str) -> RenderedRow:
        return {name: str(row[name]) for name in ("ask", *SIDES)}

    def split_key(self, row: RenderedRow) -> RenderedRow:
        return {"ask": row["ask"]}

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerFast, date: str) -> Self:
        return replace(self, encoder=TextEncoder(tokenizer))

    def encode(self, rows: Sequence[RenderedRow], findings: Findings) -> Iterator[list[Example]]:
        assert self.encoder is not None
        texts = [(row["ask"], row["ask"] + row[side]) for row in rows for side in SIDES]
        marked = [MarkedText(text, ((len(ask), len(text)),), ends=False) for ask, text in texts]
        segments = self.encoder.encode(marked)
        return ([Example((next(segments), next(segments)))] for _ in rows)

    def prompt(self, row: RenderedRow) -> Prompt | None:
        assert self.encoder is not None
        text = row["ask"] + row["good"]
        return Prompt(*self.encoder.split_prompt(text, len(row["ask"])), row["good"])


@pytest.fixture
def job(
    model_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None
) -> TrainJob:
    monkeypatch.setattr(formats, "ROW_FORMATS", [PairFormat, *formats.ROW_FORMATS])
    rows = [{"ask": f"{i % 30}? ", "good": "yes " * (i % 9), "bad": f"no, {i}"} for i in range(60)]
    # Nothing of its sides would be trained.
    rows += [{"ask": "long " * MAX_SEQ_LENGTH + str(i), "good": "yes", "bad": "no"} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return start(
        small_config(model_of("llama"), tmp_path / "rows.jsonl", tmp_path, max_seq_length=MAX_SEQ_LENGTH)
    )


def read_sets(folder: Path) -> list[list[dict[str, str]]]:
    files = [folder / f"{name}.jsonl" for name in ("training", "validation", "test")]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_its_examples_are_pairs_with_the_tokens_of_their_rows(job: TrainJob) -> None:
    prepared = open_prepared(job.prepared_path)
    tokens, tokenizer = prepared.train, build_tokenizer("byte_bpe")
    rows = read_sets(prepared.data_dir)[0]
    assert (prepared.row_format, tokens.num_segments) == ("pair", 2)
    for i, row in enumerate(rows[number] for number in tokens.rows):
        for side, name in enumerate(SIDES):
            ids, trained = tokens.segment(2 * i + side)
            answer = row[name] + tokenizer.eos_token
            assert len(ids) == tokens.segments[i, side] <= MAX_SEQ_LENGTH
            assert (row["ask"] + answer).startswith(tokenizer.decode(ids))
            assert answer.startswith(tokenizer.decode(ids[trained]))
    num_long = sum(row["ask"].startswith("long") for row in rows)
    assert num_long > 0
    assert (prepared.stats.train.examples, prepared.stats.train.dropped) == (len(rows) - num_long, num_long)
    packed = [int(tokens.lengths[pack].sum()) for pack in tokens.packs]
    assert MAX_SEQ_LENGTH < max(packed) <= 2 * MAX_SEQ_LENGTH


def test_its_pairs_are_not_cut_for_packs(job: TrainJob) -> None:
    config = job.config.model_copy(update={"concatenate": True, "run_name": "cut"})
    with pytest.raises(ConfigError, match="those of pair are several segments that belong together"):
        start(config)


def test_rows_of_equal_split_keys_share_a_set(job: TrainJob) -> None:
    asked = [{row["ask"] for row in rows} for rows in read_sets(open_prepared(job.prepared_path).data_dir)]
    assert all(asked)
    assert sum(map(len, asked)) == len(set.union(*asked))


@pytest.mark.parametrize(("packing", "flatten"), [(True, False), (True, True), (False, False), (False, True)])
def test_a_batch_tells_which_trained_positions_are_whose(job: TrainJob, packing: bool, flatten: bool) -> None:
    tokens = open_prepared(job.prepared_path).train
    sequences = Sequences(tokens, packing, 0, flatten)
    seen: list[int] = []
    for rows in BatchPlan(len(sequences), GlobalBatch(2, 3), 0).microbatches(1):
        batch = sequences.collate(rows)
        examples = sequences.examples(rows)
        seen += examples
        assert batch.num_trained == tuple(
            num_trained_of(tokens, i, side) for i in examples for side in (0, 1)
        )
        begins = (batch.position_ids_BT == 0).sum()
        assert begins >= 2 * len(examples)  # padding begins anew too
        segments = torch.split(batch.targets_N, list(batch.num_trained))
        for i, pair in zip(examples, zip(segments[::2], segments[1::2], strict=True), strict=True):
            for side, targets in enumerate(pair):
                ids, trained = tokens.segment(2 * i + side)
                assert targets.tolist() == ids[trained].tolist()
    assert len(seen) == len(set(seen))


def num_trained_of(tokens: TokenSet, example: int, side: int) -> int:
    return int(np.sum(tokens.segment(2 * example + side)[1]))


def test_it_trains(job: TrainJob) -> None:
    run = train_here(job)
    assert ending_of(run) == "finished"
    assert list(losses(run)) == [1, 2, 3, 4]
    assert run.read_params()["data"]["row_format"] == "pair"
