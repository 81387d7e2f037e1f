"""Several data sets as one: each read in its own way, split without a row on two sides, known by its number."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from support.data_sets import CHAT, SUM_TEMPLATES, SUMS, prepare_both, read_set, write_rows
from support.tokenizers import build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.data.mixture import dataset_of, prompt_of, recorded_formats, without_tag
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.errors import DataError

SETS = ("training", "validation", "test")


def tokens_of(prepared: Prepared, dataset_id: int) -> list[tuple[list[int], list[bool]]]:
    tokens = prepared.train
    chosen = [i for i in range(tokens.num_examples) if tokens.dataset_ids[i] == dataset_id]
    return [(ids.tolist(), trained.tolist()) for ids, trained in map(tokens.example, chosen)]


def test_each_is_split_and_encoded_as_it_would_be_alone(tmp_path: Path) -> None:
    config, prepared = prepare_both(tmp_path)
    assert prepared.row_format == ["template", "messages"]
    for i, settings in enumerate(config.data_sets):
        given = settings.model_dump(exclude_unset=True)
        alone = prepare(
            TrainConfig(**given, max_seq_length=64, num_proc=1), build_tokenizer("chatml"), tmp_path / f"{i}"
        )
        assert tokens_of(prepared, i) == tokens_of(alone, 0) != []
        for name in SETS:
            rows = [without_tag(row) for row in read_set(prepared, name) if dataset_of(row) == i]
            assert rows == read_set(alone, name)


def test_a_list_of_one_is_the_flat_settings(tmp_path: Path) -> None:
    given = {"dataset_name": write_rows(tmp_path / "sums.jsonl", SUMS), **SUM_TEMPLATES}
    flat, listed = TrainConfig(**given, max_seq_length=32), TrainConfig(datasets=[given], max_seq_length=32)
    assert flat == listed
    assert flat.model_fields_set == listed.model_fields_set
    tokenizer = build_tokenizer("byte_bpe")
    assert prepare(flat, tokenizer, tmp_path).folder == prepare(listed, tokenizer, tmp_path).folder


def test_rows_that_two_share_are_held_out_of_both_or_of_none(tmp_path: Path) -> None:
    shared = [{"text": f"row {i}"} for i in range(60)]
    first = write_rows(tmp_path / "first.jsonl", shared)
    second = write_rows(
        tmp_path / "second.jsonl", [*shared[30:], *({"text": f"more {i}"} for i in range(30))]
    )
    config = TrainConfig(
        datasets=[{"dataset_name": first, "train_split_ratio": 0.5}, {"dataset_name": second}], num_proc=1
    )
    prepared = prepare(config, build_tokenizer("byte_bpe"), tmp_path / "datasets")
    sides = [{row["output"] for row in read_set(prepared, name)} for name in SETS]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert sum(len(read_set(prepared, name)) for name in SETS) == 120


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_an_error_of_a_row_names_it_in_its_own_source(tmp_path: Path) -> None:
    sums = write_rows(tmp_path / "sums.jsonl", SUMS * 70)
    chat = [json.loads(json.dumps(CHAT[i % 40])) for i in range(4200)]
    chat[4100]["messages"][0]["role"] = "critic"
    config = TrainConfig(
        datasets=[
            {"dataset_name": sums, **SUM_TEMPLATES, "train_split_ratio": 1.0},
            {"dataset_name": write_rows(tmp_path / "chat.jsonl", chat), "train_split_ratio": 1.0},
        ],
        num_proc=2,
    )
    with pytest.raises(DataError, match=r"chat.jsonl`, line 4101: the chat template refuses"):
        prepare(config, build_tokenizer("qwen3"), tmp_path / "datasets")


def test_prompts_of_the_test_set_are_read_by_what_was_recorded(tmp_path: Path) -> None:
    config, prepared = prepare_both(tmp_path, seed=1)
    tokenizer = build_tokenizer("chatml")
    formats = [
        it.with_tokenizer(tokenizer, "2026-01-31")
        for it in recorded_formats(prepared.row_format, config.data_sets)
    ]
    prompts = [(row, prompt_of(formats, row)) for row in read_set(prepared, "test")]
    assert {dataset_of(row) for row, _ in prompts} == {0, 1}
    for row, prompt in prompts:
        assert prompt is not None
        assert prompt.text.rstrip() == row.get("input", prompt.text).rstrip()
        assert prompt.reference == row.get("output", "Hello")


def test_another_order_is_another_set_and_the_same_is_found(tmp_path: Path) -> None:
    config, prepared = prepare_both(tmp_path)
    assert config.datasets is not None
    turned = config.model_copy(update={"datasets": config.datasets[::-1]})
    tokenizer = build_tokenizer("chatml")
    assert prepare(turned, tokenizer, tmp_path / "datasets").data_dir != prepared.data_dir
    assert prepare(config, tokenizer, tmp_path / "datasets").folder == prepared.folder
