"""Rows from every kind of source, and one clear error for each that can't be read."""

from __future__ import annotations

import csv
import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tunesmith.config import TrainConfig
from tunesmith.data.formats import choose_format
from tunesmith.data.sources import read_rows, source_fingerprint
from tunesmith.errors import DataError

ROWS = [{"q": "Größe?", "a": "1"}, {"q": "a\u2028b\r\nc", "a": ""}, {"q": '"x", {y}', "a": "3"}]


def read(name: object, **given_settings: Any) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(TrainConfig(dataset_name=str(name), **given_settings))]


def fingerprint(name: object, **given_settings: Any) -> str:
    return source_fingerprint(TrainConfig(dataset_name=str(name), **given_settings))


def write_jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8", newline="")


def write_json(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    path.write_text(json.dumps(rows, indent=2), "utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_of_each_kind_gives_its_rows_in_order(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"rows{suffix}")
    assert read(tmp_path / f"rows{suffix}") == ROWS


def test_json_lines_may_have_a_byte_order_mark_blank_lines_and_another_suffix(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert read(tmp_path / "rows.json") == [{"a": 1}, {"a": 2}]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.text()))),
       indent=st.sampled_from([None, 0, 3]))  # fmt: skip
def test_a_json_array_of_any_layout_is_read(
    tmp_path: Path, rows: list[dict[str, Any]], indent: int | None
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=indent))
    if rows:
        assert read(path) == rows
    else:
        with pytest.raises(DataError, match="holds no rows"):
            read(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_whatever_the_file_is_called(
    tmp_path: Path, suffix: str, indent: int | None
) -> None:
    (tmp_path / f"rows{suffix}").write_text(json.dumps(ROWS, indent=indent))
    assert read(tmp_path / f"rows{suffix}") == ROWS


def test_a_number_keeps_its_text_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    written = ["1.50", "1e5", "-0.0", "12345678901234567890", "3"]
    path.write_text("".join(f'{{"text": {text}}}\n' for text in [*written, "NaN", "null"]))
    row_format = choose_format(TrainConfig(dataset_name=str(path)), {"text": ""}, "rows")
    texts = [row_format.render(row, "row")["output"] for row in read(path)]
    assert texts == [*written, "", ""]


def test_a_json_array_longer_than_a_chunk_is_read(tmp_path: Path) -> None:
    rows = [{"a": "x" * 700_000, "n": i} for i in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    assert read(tmp_path / "rows.json") == rows


def test_csv_values_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('a,b\n007,\n1.50,"x\ny"\n')
    assert read(tmp_path / "rows.csv") == [{"a": "007", "b": ""}, {"a": "1.50", "b": "x\ny"}]


def test_a_saved_data_set_without_rows_is_told(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.select([]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([])}).save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match=r"`one` .* holds no rows"):
        read(tmp_path / "one")
    with pytest.raises(DataError, match=r"`dict` .* holds no rows"):
        read(tmp_path / "dict", split="test")


def test_a_damaged_page_of_a_parquet_file_is_no_matter_of_permissions(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": [f"row {i} " * 20 for i in range(3000)]})
    parquet.write_table(table, path, compression="snappy", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[200:2000] = b"\xff" * 1800
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"can't read `.*rows\.parquet`") as caught:
        read(path)
    assert caught.value.hint == "it is damaged: fetch or write it again"


def test_a_saved_data_set_gives_its_rows(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "one") == ROWS
    assert read(tmp_path / "dict") == ROWS
    assert read(tmp_path / "dict", split="test") == ROWS[1:2]
    with pytest.raises(DataError, match="has no split `dev`") as caught:
        read(tmp_path / "dict", split="dev")
    assert caught.value.hint == "its splits are `test`, `train`"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2 is a list, not an object"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "\xfc"}\n', "line 2 is not UTF-8: byte 0xfc at column 8"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.json", b"", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b'[{"a": 1},\n {"a": }]', r"item 2 \(line 2\) is not valid JSON"),
        ("a.json", b'[{"a": 1},\n 7]', r"item 2 \(line 2\) is a int"),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', "line 2: `,` expected, `{` found"),
        ("a.json", b'[{"a": 1},\n', r"item 2 \(line 2\) is not valid JSON"),
        ("a.json", b'[{"a": 1}]\nx', "line 2: `x` after the end"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has 3 fields, and the header has 2"),
        ("a.csv", b'a,b\n1,"2\n', "is not valid CSV"),
        ("a.csv", b"a,b\n1,\xff\n", "line 2 is not UTF-8"),
        ("a.csv", b"a,b\n", "holds no rows"),
        ("a.csv", b"q,a,a\n1,2,3\n", "line 1 names the column `a` twice"),
        ("a.csv", b"q;a\n1,5;2\n", "line 1 is separated by `;`"),
        ("a.jsonl", b'{"a": 1, "a": 2}\n', "line 1 has the key `a` twice in one object"),
        ("a.jsonl", b'{"a": {"b": 1, "b": 2}}\n', "line 1 has the key `b` twice in one object"),
        ("a.json", b'[{"a": 1},\n {"a": 1, "a": 2}]', r"item 2 \(line 2\) has the key `a` twice"),
        ("a.jsonl", b'{"a": 1' + b"0" * 5000 + b"}\n", "line 1 holds a whole number of 5,001 digits"),
        (
            "a.json",
            b'[{"a": -1' + b"0" * 5000 + b"}]",
            r"item 1 \(line 1\) holds a whole number of 5,001 digits",
        ),
        ("a.jsonl", b'{"a": 1e400}\n', "line 1 holds the number 1e400, which is too large"),
        ("a.jsonl", b'{"a": -Infinity}\n', "line 1 holds -Infinity, which is no number"),
        ("a.parquet", b"PAR1 no", "is not a valid Parquet file"),
        ("a.rows", b"hello", "unknown suffix"),
    ],
)
def test_a_malformed_file_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert name in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "name",
    [
        *("./none", "/none/at/all", "~/none-at-all", "rows.jsonl", "data/rows.parquet", "rows.jsonl.gz"),
        *(
            "data/rows.jsonl.zst",
            "rows.txt",
            "rows.tsv",
            "rows.xlsx",
            "data/rows.arrow",
            "scripted/absent.py",
        ),
    ],
)
def test_a_path_that_is_not_there_is_no_such_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        read(name)


def test_an_unknown_hub_id_is_refused_with_what_was_tried() -> None:
    with pytest.raises(DataError, match="can't load data set `nobody/nothing-at-all`") as caught:
        read("nobody/nothing-at-all", dataset_revision="v2")
    assert "revision v2" in str(caught.value.hint)
    with pytest.raises(DataError, match="can't load data set"):
        fingerprint("nobody/nothing-at-all")


def test_an_empty_folder_and_a_sliced_local_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file of rows"):
        read(tmp_path)
    write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="slices a local data set"):
        read(tmp_path / "a.jsonl", split="train[:10%]")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        read(tmp_path / "a.jsonl")


def test_the_fingerprint_follows_the_content_and_nothing_else(tmp_path: Path) -> None:
    for suffix, write in WRITERS.items():
        write(tmp_path / f"rows{suffix}")
    first = {suffix: fingerprint(tmp_path / f"rows{suffix}") for suffix in WRITERS}
    assert len(set(first.values())) == len(WRITERS)
    (tmp_path / "moved").mkdir()
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved" / "other.jsonl")
    assert fingerprint(tmp_path / "moved" / "other.jsonl") == first[".jsonl"]
    with (tmp_path / "moved" / "other.jsonl").open("a") as stream:
        stream.write('{"q": "more"}\n')
    assert fingerprint(tmp_path / "moved" / "other.jsonl") != first[".jsonl"]


def test_the_fingerprint_of_a_folder_is_of_its_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"a": 1}])
    before = fingerprint(tmp_path)
    write_jsonl(tmp_path / "test.jsonl", [{"a": 9}])
    assert fingerprint(tmp_path) == before
    assert fingerprint(tmp_path, split="test") != before


def write_on_one_line(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    path.write_text(json.dumps(rows))


def write_under_a_key(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    path.write_text(json.dumps({"about": "rows", "data": rows, "more": [rows[0]] * 3}))


def write_packed(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    with gzip.open(path, "wt", compresslevel=1) as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *((f"rows{suffix}", write) for suffix, write in WRITERS.items()),
        ("one_line.json", write_on_one_line),
        ("under_a_key.json", write_under_a_key),
        ("packed.jsonl.gz", write_packed),
    ],
)
def test_reading_holds_no_more_than_a_chunk_of_rows(
    tmp_path: Path, name: str, write: Callable[..., None]
) -> None:
    path = tmp_path / name
    write(path)  # warms up what is imported on first use
    read(path)
    write(path, [{"q": f"{i} " + "x" * 600, "a": "y"} for i in range(20_000)])
    config = TrainConfig(dataset_name=str(path))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(config)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("way", ["parquet", "saved"])
def test_whole_numbers_that_gaps_made_floats_are_whole_again(
    tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tunesmith")
    columns = {
        "gapped": [4.0, None, 7.0],
        "whole": [1.0, 2.0, 3.0],
        "broken": [0.5, None, 2.0],
        "large": [float(2**60), None, 1.0],
        "not_there": [float("nan"), 1.0, 2.0],
    }
    path = tmp_path / "rows.parquet" if way == "parquet" else tmp_path / "saved"
    if way == "parquet":
        parquet.write_table(pa.table(columns), path)
    else:
        datasets.Dataset.from_dict(columns).save_to_disk(path)
    expected = {
        **columns,
        "gapped": [4, None, 7],
        "not_there": [None, 1, 2],
    }
    for _ in range(2):
        found = read(path)
        assert [{name: str(row[name]) for name in columns} for row in found] == [
            {name: str(values[i]) for name, values in expected.items()} for i in range(3)
        ]
    said = [record.getMessage() for record in caplog.records if "4.0 is read as 4" in record.getMessage()]
    assert len(said) == 2
    assert "`gapped`" in said[0]
