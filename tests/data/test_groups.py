"""Rows of a user or a document that stay on one side of the split."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.data_sets import read_set, write_rows
from support.tokenizers import build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.split import SETS
from tunesmith.errors import DataError

# Of 50 users, who wrote 1 to 8 rows each.
ROWS = [{"text": f"user {user} says {i}", "user": user} for user in range(50) for i in range(1 + user % 8)]


def prepare_texts(folder: Path, *sets: list[dict[str, Any]], **changes: Any) -> Prepared:
    names = [write_rows(folder / f"{i}.jsonl", rows) for i, rows in enumerate(sets)]
    settings = [
        {"dataset_name": name, "train_split_ratio": 0.7, "group_by": "user", **changes} for name in names
    ]
    config = TrainConfig(datasets=settings, num_proc=1)
    return prepare(config, build_tokenizer("byte_bpe"), folder / "datasets")


def sides_of(prepared: Prepared) -> list[list[str]]:
    return [[row["output"] for row in read_set(prepared, name)] for name in SETS]


def users_of(prepared: Prepared) -> list[set[str]]:
    return [{text.split()[1] for text in texts} for texts in sides_of(prepared)]


def test_rows_of_a_group_stay_on_one_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):  # the second time they are found prepared
        caplog.clear()
        with caplog.at_level(logging.INFO):
            prepared = prepare_texts(tmp_path, ROWS)
        assert "`0.jsonl` (train): 50 groups of rows by `user`" in caplog.text
        assert "none of the" in caplog.text and "test rows is in the training set" in caplog.text
    users = users_of(prepared)
    assert sum(map(len, users)) == 50 == len(set.union(*users))
    # As near to the shares as whole groups allow: they have at most 8 rows.
    sizes = list(map(len, sides_of(prepared)))
    for size, share in zip(sizes, (0.7, 0.15, 0.15), strict=True):
        assert abs(size - share * len(ROWS)) <= 8


def test_without_groups_users_are_on_several_sides(tmp_path: Path) -> None:
    assert sum(map(len, users_of(prepare_texts(tmp_path, ROWS, group_by=None)))) > 50


def test_equal_values_of_several_data_sets_share_a_side(tmp_path: Path) -> None:
    others = [{"text": f"user {user} writes", "user": str(user)} for user in range(50)]
    users = users_of(prepare_texts(tmp_path, ROWS, others))
    assert sum(map(len, users)) == 50 == len(set.union(*users))


def test_a_row_without_a_value_stands_for_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing: list[dict[str, Any]] = [{"user": None}, {"user": ""}, {"user": float("nan")}, {}]
    lone = [{"text": f"lone {i}", **missing[i % 4]} for i in range(100)]
    rows = [{"text": f"user 1.0 says {i}", "user": 1.0} for i in range(20)]
    rows += [{"text": f"user 1 says {i}", "user": 1} for i in range(20)]
    with caplog.at_level(logging.INFO):
        sides = sides_of(prepare_texts(tmp_path, [*rows, *lone]))
    assert "1 group of rows by `user`; 100 rows without one stand for themselves" in caplog.text
    assert sum(any(text.startswith("user") for text in side) for side in sides) == 1
    assert all(any(text.startswith("lone") for text in side) for side in sides)


def test_equal_rows_of_two_groups_are_counted_where_they_are_on_two_sides(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "user": user} for i in range(40) for user in (f"a{i}", f"b{i}")]
    prepared = prepare_texts(tmp_path, rows)
    training, *others = (Counter(texts) for texts in sides_of(prepared))
    counted = [sum(number for text, number in texts.items() if text in training) for texts in others]
    assert [prepared.stats.overlap["validation"], prepared.stats.overlap["test"]] == counted
    assert sum(counted) > 0


def test_an_equal_row_of_a_set_without_groups_is_held_out_too(tmp_path: Path) -> None:
    grouped, plain = write_rows(tmp_path / "a.jsonl", ROWS), write_rows(tmp_path / "b.jsonl", ROWS)
    first = {"dataset_name": grouped, "group_by": "user", "train_split_ratio": 0.6}
    second = {"dataset_name": plain, "train_split_ratio": 1.0}
    config = TrainConfig(datasets=[first, second], num_proc=1)
    prepared = prepare(config, build_tokenizer("byte_bpe"), tmp_path / "datasets")
    sides = sides_of(prepared)
    assert all(sides) and prepared.stats.overlap == {"validation": 0, "test": 0}
    assert sorted(text for side in sides for text in side) == sorted(2 * [row["text"] for row in ROWS])
    # And a row that is out there takes its group along.
    halves = {"datasets": [{**first, "train_split_ratio": 0.9}, {**second, "train_split_ratio": 0.9}]}
    users = users_of(
        prepare(TrainConfig(**halves, num_proc=1), build_tokenizer("byte_bpe"), tmp_path / "more")
    )
    assert sum(map(len, users)) == 50


def test_the_first_row_may_lack_the_column(tmp_path: Path) -> None:
    users = users_of(prepare_texts(tmp_path, [{"text": "user x says"}, *ROWS]))
    assert sum(map(len, users)) == 51


def test_an_absent_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`group_by` names column `author`") as caught:
        prepare_texts(tmp_path, ROWS, group_by="author")
    assert caught.value.hint == "the columns are `text`, `user`"
