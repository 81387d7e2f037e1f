"""Files whose name and content are at odds: read where there is one meaning, else told what they are."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from support.tokenizers import build_tokenizer
from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.data.prepare import prepare
from tunesmith.data.sources import describe_files, read_rows
from tunesmith.errors import DataError

ROWS = [{"text": "a b"}, {"text": "ü 👍"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
CSV = b"text,more\na b,1\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def read(path: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for _, row in read_rows(TrainConfig(dataset_name=str(path), split=split))]


def holder(indent: int | None = None, **values: Any) -> bytes:
    return json.dumps(values, indent=indent).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.csv", LINES),
        ("lines.parquet", LINES),
        ("array.csv", ARRAY),
        ("over_lines.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode()),
        ("on_one_line.jsonl", LINES.replace(b"\n", b"")),
        ("later_on_one_line.jsonl", b"\n" + LINES),
        ("commas.jsonl", LINES.replace(b"}\n", b"},\n")),
        ("comma_at_the_end.jsonl", LINES.removesuffix(b"\n") + b",\n"),
        ("under_data.json", holder(data=ROWS)),
        ("under_data.json", holder(indent=2, data=ROWS)),
        ("under_data.jsonl", holder(data=ROWS)),
        ("under_any.json", holder(taken_on_monday=ROWS)),
        ("with_a_version.json", holder(indent=1, version="1.1", data=ROWS, tags=["a"])),
        ("splits.json", holder(test=[{"text": "no"}], train=ROWS)),
        ("splits.json", holder(indent=1, Training=ROWS, dev=[], version=2)),
        ("packed.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("packed.jsonl.bz2", bz2.compress(LINES)),
        ("packed.jsonl.xz", lzma.compress(LINES)),
        ("packed.jsonl.zst", zstd(LINES)),
        ("in_two_frames.jsonl.zst", b"".join(zstd(line) for line in LINES.splitlines(keepends=True))),
        ("in_two_members.jsonl.gz", b"".join(gzip.compress(line, mtime=0) for line in LINES.splitlines(keepends=True))),
        ("packed_in_secret.jsonl", gzip.compress(LINES, mtime=0)),
        ("unpacked_in_secret.jsonl.gz", LINES),
        ("packed.JSON.GZ", gzip.compress(ARRAY, mtime=0)),
        ("marked.jsonl", LINES.decode().encode("utf-8-sig")),
        ("wide.jsonl", LINES.decode().encode("utf-16")),
        ("wider.jsonl", LINES.decode().encode("utf-32")),
        ("wide.json", ARRAY.decode().encode("utf-16")),
        ("big_endian.jsonl", b"\xfe\xff" + LINES.decode().encode("utf-16-be")),
    ],
)  # fmt: skip
def test_what_has_one_meaning_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ROWS


def test_parquet_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.json")
    assert read(tmp_path / "rows.json") == ROWS


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]},
        {"conversations": [{"from": "human", "value": "hi"}]},
        {"dialogue": [{"speaker": "me", "text": "hi"}], "id": 7},
        {"question": "which?", "choices": [{"label": "A"}], "answer": "A"},
        {"text": "a", "tags": []},
        {"text": "a", "tags": ["x"], "more": {"y": 1}},
        {"instruction": "Do", "output": "X", "examples": [{"text": "no"}]},
        {"prompt": "p", "completion": "c", "items": [{"text": "no"}], "n": 1},
        {"text": "a", "records": [{"text": "no"}]},
    ],
)
@pytest.mark.parametrize("name", ["one.json", "one.jsonl"])
def test_a_single_row_is_a_row(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    for indent in (None, 1):
        (tmp_path / name).write_bytes(holder(indent=indent, **row))
        assert read(tmp_path / name) == [row]


def test_each_split_of_one_file_is_read_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(holder(train=ROWS, val=ROWS[:1], test=[]))
    assert read(path, "validation") == ROWS[:1]
    with pytest.raises(DataError, match="holds no rows"):
        read(path, "test")
    path.write_bytes(holder(test=ROWS, dev=ROWS))
    with pytest.raises(DataError, match="holds no split `train`") as caught:
        read(path)
    assert caught.value.hint == "its splits are `test`, `dev`"
    # A name as it is written comes before one of the same meaning.
    path.write_bytes(holder(eval=ROWS[:1], test=ROWS, train=ROWS, train_extra=ROWS[:1]))
    assert [len(read(path, split)) for split in ("eval", "test", "train", "train_extra")] == [1, 2, 2, 1]
    with pytest.raises(DataError, match="holds several lists of split `Train`") as caught:
        read(path, "Train")
    assert caught.value.hint == "name one: `train`, `train_extra`"


def test_where_the_rows_lie_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    config = TrainConfig(dataset_name=str(path))
    path.write_bytes(holder(version=1, data=ROWS))
    assert describe_files(config) == ["`rows.json` (train): rows are those under `data` in `rows.json`"]
    path.write_bytes(LINES)
    assert describe_files(config) == []


def test_csv_headers_lose_the_blanks_around_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('q, a\n1, "x, y"\n2,  z\n')
    assert read(path) == [{"q": "1", "a": "x, y"}, {"q": "2", "a": "z"}]
    path.write_text(" q ,a\n1, x\n")
    assert read(path) == [{"q": "1", "a": " x"}]
    path.write_text('\n"q", "a"\n"1", "x"\n')
    assert [*read_rows(TrainConfig(dataset_name=str(path)))] == [(f"`{path}`, line 3", {"q": "1", "a": "x"})]


def test_fields_may_be_separated_by_tabs(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text('q\ta\n1, 2\t"x\ty"\n')
    assert read(tmp_path / "rows.tsv") == [{"q": "1, 2", "a": "x\ty"}]


def test_columns_may_be_named_by_sentences(tmp_path: Path) -> None:
    (tmp_path / "form.csv").write_text("Is it right?,Answer,2024\nyes,no,3\n")
    assert read(tmp_path / "form.csv") == [{"Is it right?": "yes", "Answer": "no", "2024": "3"}]
    (tmp_path / "form.csv").write_text("What's your question?,Your best answer\nyes,no\n")
    assert read(tmp_path / "form.csv") == [{"What's your question?": "yes", "Your best answer": "no"}]
    (tmp_path / "form.csv").write_text("Who?,Why?\nyes,no\n")
    assert read(tmp_path / "form.csv") == [{"Who?": "yes", "Why?": "no"}]


ICONV = "`iconv -f ENCODING -t UTF-8`"


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("csv.jsonl", CSV, "line 1 is not valid JSON", "the file looks like CSV: name it .csv"),
        ("csv.json", CSV, "line 1 is not valid JSON", "the file looks like CSV: name it .csv"),
        ("python.jsonl", b"{'text': 1}\n", "line 1 is not valid JSON", "json.dumps"),
        ("columns.json", holder(text=["a", "b"], n=[1, 2]), "columns, not rows: `text`, `n`", "orient='records'"),
        ("pandas.json", holder(text={"0": "a", "1": "b"}), "columns, not rows: `text`", "orient='records'"),
        ("ids.json", holder(a1={"text": "x"}, b2={"text": "y"}), "keys of their own: `a1`, `b2`", "jq -c '.[]'"),
        ("two.json", holder(here=ROWS, there=ROWS), "lie under one of `here`, `there`", "jq -c '.NAME[]' two.json"),
        ("texts.json", b'["a", "b"]', r"item 1 \(line 1\) is a str, not an object", "one JSON object"),
        ("texts.jsonl", b'"a"\n"b"\n', "line 1 is a str, not an object", "one JSON object"),
        ("twice.json", ARRAY + b"\n" + ARRAY, r"line 9: `\[` after the end of the array", "jq -s add twice.json"),
        ("torn.jsonl", b'{"a": 1\n{"a": 2}\n', "line 2: `,` expected, `{` found", "one JSON object a line"),
        ("torn.jsonl", b'{"a": 1}\n{"a": "x\n', "line 2 is not valid JSON: it ends before", "one JSON object"),
        ("torn.json", holder(indent=1, data=ROWS)[:-6], r"item 2 \(line 6\) is not valid JSON: it ends before", "mend"),
        ("bad.json", b'{"data": [\n{"a": 1},\n{"a":\n x}]}', r"item 2 \(line 3\) .* value in line 4", "mend"),
        ("values.csv", b"1,2\n3,4\n", "line 1 seems to be a row, not a header: `1`, `2`", "columns' names"),
        ("values.csv", b"What is 2+2?,4\nx,5\n", "seems to be a row, not a header: `What", "rename its columns"),
        ("excel.csv", b"q,a,,\n1,2,,\n", "line 1 leaves columns 3, 4 without a name", "delete the empty columns"),
        ("tabs.csv", b"q\ta\n1\t2\n", "line 1 is separated by tabs", "name it .tsv"),
        ("bars.csv", b"q|a\n1|2\n", r"line 1 is separated by `\|`", "with commas"),
        ("cut.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "packed as .gz, and damaged", "fetch or pack the file again"),
        ("cut.jsonl.bz2", bz2.compress(LINES)[:-9], "packed as .bz2, and damaged", "fetch or pack"),
        ("cut.jsonl.xz", lzma.compress(LINES)[:-9], "packed as .xz, and damaged", "fetch or pack"),
        ("cut.jsonl.zst", zstd(LINES)[:-9], "packed as .zst, and damaged", "fetch or pack"),
        ("bad.jsonl.gz", b"\x1f\x8b" + LINES, "packed as .gz, and damaged", "fetch or pack"),
        ("rows.gz", gzip.compress(LINES, mtime=0), "an unknown suffix before .gz", "name it as rows.jsonl.gz"),
        ("rows.parquet.gz", gzip.compress(b"PAR1" + LINES, mtime=0), "a packed Parquet file", "unpack it"),
        ("rows.jsonl", LINES.decode().encode("utf-16-le"), "UTF-16LE without a byte", "iconv -f UTF-16LE -t UTF-8"),
        ("rows.jsonl", LINES.decode().encode("utf-16-be"), "UTF-16BE without a byte", "iconv -f UTF-16BE -t UTF-8"),
        ("rows.jsonl", LINES.decode().encode("utf-16")[:-1], "isn't from line 2 on", "fetch or write"),
        ("rows.jsonl", b'{"text": "\xed\xa0\xbd\xed\xb1\x8d"}', "line 1 is CESU-8, not UTF-8", "uconv -f CESU-8"),
        ("rows.json", b'[{"text": "\xed\xa0\xbd\xed\xb1\x8d"}]', "line 1 is CESU-8, not UTF-8", "uconv -f CESU-8"),
        ("rows.jsonl", b'{"text": "x"}\n{"text": "\xfc"}\n', "line 2 is not UTF-8", ICONV),
        ("rows.json", b'[{"text": "x"},\n{"text": "\xfc"}]', "line 2 is not UTF-8: byte 0xfc at column 11", ICONV),
        ("rows.jsonl", LINES + b'{"text": "\xfc"}\n', "line 3 is not UTF-8", "the text before it is UTF-8"),
        ("rows.json", ARRAY + b'\n"\xfc"', "line 9 is not UTF-8", "the text before it is UTF-8"),
        ("rows.jsonl", '{"text": "ü'.encode()[:-1], "line 1 is not UTF-8", "cut there"),
        *((f"rows{suffix}", LFS, "is a Git LFS pointer", "`git lfs pull`") for suffix in (".jsonl", ".parquet", ".csv")),
        ("rows.jsonl", b"\n<!DOCTYPE html><html>", "is a web page", "/resolve/"),
        ("rows.jsonl", b"PK\x03\x04....", "is a ZIP archive", "unpack it"),
        ("rows.jsonl.gz", gzip.compress(b"a" + b"\0" * 256 + b"ustar", mtime=0), "is an archive", "unpack it"),
        ("rows.csv", b"\x00\x01\x02\x03binary", "holds NUL bytes", "JSON lines"),
        ("rows.parquet", b"q,a\n", "is not a valid Parquet file: it begins with", "again"),
        ("rows.txt", b"hello", "is plain text", '{"text": "…"}'),
        ("rows.xlsx", b"PK\x03\x04", "is a spreadsheet", "CSV"),
        ("rows.arrow", b"ARROW1", "is an Arrow file", "to_parquet"),
        ("rows.tar", b"", "is an archive", "unpack"),
        ("rows.py", b"", "a script is no data set", "refs/convert/parquet"),
    ],
)  # fmt: skip
def test_what_can_t_be_read_is_told_by_what_it_is(
    tmp_path: Path, name: str, content: bytes, message: str, hint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert name in caught.value.message
    assert hint in str(caught.value.hint)
    assert "LATIN1" not in str(caught.value.hint)


def test_the_hint_s_conversion_gives_the_rows(tmp_path: Path) -> None:
    convert = "iconv -f UTF-16LE -t UTF-8"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES.decode().encode("utf-16-le"))
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"`{convert}`" in str(caught.value.hint)
    path.write_bytes(subprocess.run([*convert.split(), path], capture_output=True, check=True).stdout)
    assert read(path) == ROWS


def test_a_long_value_is_parsed_once_over_many_chunks(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    row = {"text": "x" * 5_000_000, "ü": ["ü" * 1000] * 1000}
    path.write_text(json.dumps({"data": [row, row]}, ensure_ascii=False))
    assert read(path) == [row, row]


def test_splits_that_one_file_holds_are_prepared_apart(tmp_path: Path) -> None:
    path = tmp_path / "both.json"
    path.write_text(json.dumps({"train": [{"text": "trained"}], "test": [{"text": "tested"}]}))
    texts = []
    for split in ("train", "test"):
        config = TrainConfig(
            dataset_name=str(path), split=split, train_split_ratio=1.0, max_seq_length=32, num_proc=1
        )
        prepared = prepare(config, build_tokenizer("byte_bpe"), tmp_path / "sets")
        texts.append(json.loads((prepared.data_dir / "training.jsonl").read_text())["output"])
    assert texts == ["trained", "tested"]


def test_a_column_or_a_key_that_parquet_has_twice_is_refused(tmp_path: Path) -> None:
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(
        pyarrow.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "twice.parquet"
    )
    with pytest.raises(DataError, match="the column `text` twice"):
        list(read_rows(HFDatasetConfig(dataset_name=str(tmp_path / "twice.parquet"))))
