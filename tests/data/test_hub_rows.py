"""What the `datasets` library reads, and whatever it raises. It takes a folder below this one for a hub id's files."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pyarrow
import pytest

from tunesmith.config import TrainConfig
from tunesmith.data.hub import hub_commit, read_hub
from tunesmith.data.sources import read_rows
from tunesmith.errors import DataError

ANSWERS = ["null", "NA", "None", "NaN", "nan", "N/A", "true", "1e5", "007", "1.50", ""]
PARQUET_BRANCH = "dataset_revision: refs/convert/parquet"


@pytest.fixture(autouse=True)
def at_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)


def read(name: str, **given: str) -> list[dict[str, object]]:
    return list(read_hub(TrainConfig(dataset_name=name, **given), f"`{name}`"))


def refusal(name: str, **given: str) -> DataError:
    with pytest.raises(DataError) as caught:
        read(name, **given)
    assert caught.value.hint
    return caught.value


def test_answers_of_a_csv_file_are_texts_as_they_are_written() -> None:
    write("rows/train.csv", "q,a\n" + "".join(f"{i},{answer}\n" for i, answer in enumerate(ANSWERS)))
    rows = read("rows")
    assert rows == [{"q": str(i), "a": answer} for i, answer in enumerate(ANSWERS)]
    assert rows == [row for _, row in read_rows(TrainConfig(dataset_name="rows/train.csv"))]


def test_answers_separated_by_tabs_are_texts_too() -> None:
    write("rows/train.tsv", "q\ta\n1\tNA\n")
    assert read("rows") == [{"q": "1", "a": "NA"}]


def test_a_column_of_numbers_may_end_in_text() -> None:
    # The library reads 10,000 rows at a time, and by its defaults takes a column for what the first are.
    write("rows/train.csv", "q,a\n" + "1,2\n" * 10_001 + "1,\n1,two\n")
    assert [row["a"] for row in read("rows")[-3:]] == ["2", "", "two"]


def test_numbers_of_other_files_are_left_as_they_are() -> None:
    write("rows/train.jsonl", '{"a": 7, "b": null}\n')
    assert read("rows") == [{"a": 7, "b": None}]


def test_csv_rows_that_were_read_once_are_found_without_the_hub() -> None:
    write("Rows/train.csv", "q,a\n1,NA\n2,x\n")
    rows, commit = read("Rows"), hub_commit(TrainConfig(dataset_name="Rows"), "")
    datasets.load_dataset("Rows")  # what others have cached of it, with pandas' defaults
    shutil.rmtree("Rows")
    assert read("Rows") == rows == [{"q": "1", "a": "NA"}, {"q": "2", "a": "x"}]
    assert read("Rows", split="train[:1]") == rows[:1]
    assert hub_commit(TrainConfig(dataset_name="Rows"), "") == commit
    assert "Unknown split" in refusal("Rows", split="test").message


@pytest.mark.parametrize("name", ["scripted/absent.py", "scripted"])
def test_a_loading_script_is_told_with_the_branch_that_needs_none(name: str) -> None:
    write("scripted/scripted.py", "")
    error = refusal(name)
    assert "Dataset scripts are no longer supported" in error.message
    assert (
        f"it has a loading script, which isn't run; take its Parquet branch: {PARQUET_BRANCH}" == error.hint
    )


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("rows/train.csv", "q,a\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("rows/train.jsonl", '{"a": 1}\n{"a":\n', "JSON parse error"),
        ("rows/train.parquet", "PAR1", "Parquet"),
    ],
)
def test_bad_content_is_told_with_its_cause(name: str, text: str, cause: str) -> None:
    write(name, text)
    error = refusal("rows")
    assert cause in error.message
    assert "An error occurred" not in error.message
    assert "network" not in str(error.hint)
    assert PARQUET_BRANCH in str(error.hint)


def test_an_unknown_split_is_told_with_those_there_are() -> None:
    write("rows/train.csv", "q,a\n1,2\n")
    error = refusal("rows", split="test")
    assert "Unknown split" in error.message
    assert "['train']" in error.message
    assert error.hint == "name another --split"


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (KeyError("column"), "KeyError: 'column'"),
        (TypeError("not this"), "TypeError: not this"),
        (NotImplementedError("not yet"), "not yet"),
        (ImportError("no package"), "ImportError: no package"),
        (AttributeError(), "AttributeError"),
        (RuntimeError("one line\nand another that is left out because the first one says so"), "one line"),
        (datasets.exceptions.DatasetNotFoundError("nowhere"), "nowhere"),
        (pyarrow.ArrowInvalid("not Parquet"), "not Parquet"),
    ],
)
def test_whatever_the_library_raises_is_one_error(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    for ask in (read, lambda name: hub_commit(TrainConfig(dataset_name=name), f"`{name}`")):
        with pytest.raises(DataError, match="can't load data set `org/name`: ") as caught:
            ask("org/name")
        assert message in caught.value.message
        assert caught.value.hint


def test_an_interruption_is_no_error_of_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "load_dataset_builder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read("org/name")
