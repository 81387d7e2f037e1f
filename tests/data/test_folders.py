"""Which files of a folder are read: as the `datasets` library has it, and never those of another split."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from support.runs import small_config, start
from tunesmith.config import TrainConfig
from tunesmith.data import folders, prepare
from tunesmith.data.folders import describe_listing, list_files
from tunesmith.data.sources import read_rows, source_fingerprint
from tunesmith.errors import DataError
from tunesmith.train.start import check_resumable


def make(folder: Path, *names: str) -> Path:
    """Write files of one row each, which names its file."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'{{"text": "{name}"}}\n')
    return folder


def chosen(folder: Path, split: str = "train") -> list[str]:
    return [str(file.relative_to(folder)) for file in list_files(folder, split).read]


@pytest.mark.parametrize(
    "names",
    [
        ("a.jsonl", "b.jsonl"),
        ("a.jsonl", "old/b.jsonl", ".hidden.jsonl", ".git/c.jsonl", "__pycache__/d.jsonl", "README.md"),
        ("train.jsonl", "test.jsonl", "validation.jsonl", "more.jsonl"),
        ("train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "test-00000-of-00001.jsonl"),
        *(
            tuple(f"gsm-{name}-00000-of-00001.jsonl" for name in names)
            for names in (("train", "test", "validation"), ("training", "eval", "dev"))
        ),
        ("my train.jsonl", "rows_test_2.jsonl", "rows.val.jsonl", "train2.jsonl", "train_old_backup.jsonl"),
        ("train/a.jsonl", "train/deep/b.jsonl", "test/a.jsonl", "c.jsonl"),
        ("x/training_1/a.jsonl", "x/valid/a.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "train.jsonl"),
        ("latest.jsonl", "contest.jsonl", "devices.jsonl", "config.json", "dataset_info.json"),
    ],
)
def test_a_folder_is_read_as_the_library_reads_it(tmp_path: Path, names: tuple[str, ...]) -> None:
    make(tmp_path, *names)
    found = DataFilesDict.from_patterns(get_data_patterns(str(tmp_path)), str(tmp_path), [".jsonl"])
    for split in ("train", "validation", "test"):
        if split in found:
            assert chosen(tmp_path, split) == sorted({os.path.relpath(it, tmp_path) for it in found[split]})
        else:
            with pytest.raises(DataError, match=f"no file of split `{split}`"):
                chosen(tmp_path, split)


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        # The library distinguishes capitals.
        (("Train.jsonl", "TEST.jsonl"), ["Train.jsonl"], ["TEST.jsonl"]),
        (("Rows/TRAIN/a.jsonl", "Rows/Test/a.jsonl"), ["Rows/TRAIN/a.jsonl"], ["Rows/Test/a.jsonl"]),
        # It reads past names that people write as one word.
        (("trainset.jsonl", "testset.jsonl"), ["trainset.jsonl"], ["testset.jsonl"]),
        (("gsmTrain.jsonl", "gsmTest.jsonl"), ["gsmTrain.jsonl"], ["gsmTest.jsonl"]),
        (("train(1).jsonl", "test(1).jsonl"), ["train(1).jsonl"], ["test(1).jsonl"]),
        (("traingsm.jsonl", "testgsm.jsonl"), ["traingsm.jsonl"], ["testgsm.jsonl"]),
        # Of this folder, it reads every file as both.
        (("train_test/train.jsonl", "train_test/test.jsonl"), ["train_test/train.jsonl"], ["train_test/test.jsonl"]),
        # And of this one none for train.
        (("train.jsonl", "eval/a.jsonl", "eval/train.jsonl"), ["train.jsonl"], None),
    ],
)  # fmt: skip
def test_another_split_is_never_read_however_it_is_named(
    tmp_path: Path, names: tuple[str, ...], train: list[str], test: list[str] | None
) -> None:
    make(tmp_path, *names)
    assert chosen(tmp_path) == train
    if test is not None:
        assert chosen(tmp_path, "test") == test


def test_splits_of_ones_own_are_what_names_begin_with(tmp_path: Path) -> None:
    make(tmp_path, "dolly-1.jsonl", "dolly-2.jsonl", "alpaca.jsonl", "train_sft.jsonl")
    assert chosen(tmp_path, "dolly") == ["dolly-1.jsonl", "dolly-2.jsonl"]
    assert chosen(tmp_path, "train_s") == ["train_sft.jsonl"]
    make(
        tmp_path,
        *(f"hub/data/{name}-00000-of-00001.jsonl" for name in ("train_sft", "train_gen", "test_sft")),
    )
    assert chosen(tmp_path / "hub", "train_sft") == ["data/train_sft-00000-of-00001.jsonl"]
    with pytest.raises(DataError, match="no file of split `train`") as caught:
        chosen(tmp_path / "hub")
    assert "(train_gen)" in str(caught.value.hint)


@pytest.mark.parametrize(
    "name", ["train_val.jsonl", "train/test_cases.jsonl", "train-test.jsonl", "train/eval/a.jsonl"]
)
def test_a_file_that_speaks_of_two_splits_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path, name, "train/a.jsonl" if name.startswith("train/") else "train.jsonl")
    with pytest.raises(DataError, match="speaks of two splits: `t") as caught:
        chosen(tmp_path)
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("names", "formats"),
    [
        (("rows.jsonl", "rows.parquet"), r"`rows.jsonl` \(JSON\) and `rows.parquet` \(Parquet\)"),
        (("a.csv", "b.jsonl"), r"`a.csv` \(CSV\) and `b.jsonl` \(JSON\)"),
        (("json/train.json", "csv/train.csv"), r"`csv/train.csv` \(CSV\) and `json/train.json` \(JSON\)"),
        (("rows.json", "rows.jsonl"), "`rows.json` and `rows.jsonl`"),
        (("rows.jsonl", "rows.jsonl.gz"), "`rows.jsonl` and `rows.jsonl.gz`"),
    ],
)
def test_the_same_rows_in_two_formats_are_refused(
    tmp_path: Path, names: tuple[str, ...], formats: str
) -> None:
    make(tmp_path, *names)
    with pytest.raises(DataError, match=f"two formats: {formats}"):
        chosen(tmp_path)


def test_another_format_in_another_split_is_no_matter(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "test.csv")
    assert chosen(tmp_path) == ["train.jsonl"]


def test_a_folder_without_rows_says_what_it_holds(tmp_path: Path) -> None:
    make(tmp_path, "rows.xlsx", ".hidden.jsonl")
    with pytest.raises(DataError, match="holds no file of rows") as caught:
        chosen(tmp_path)
    assert caught.value.hint == "`rows.xlsx` is a spreadsheet: save it as CSV in UTF-8"


def test_a_folder_of_a_script_is_told(tmp_path: Path) -> None:
    make(tmp_path, "rows.py")
    with pytest.raises(DataError, match="holds no file of rows") as caught:
        chosen(tmp_path)
    assert "a script is no data set" in str(caught.value.hint)


def test_a_file_is_not_read_twice_by_a_link(tmp_path: Path) -> None:
    make(tmp_path, "train.jsonl", "test.jsonl")
    (tmp_path / "train_latest.jsonl").symlink_to("train.jsonl")
    with pytest.raises(DataError, match=r"`train.jsonl` and `train_latest.jsonl` .* are one file"):
        chosen(tmp_path)
    assert chosen(tmp_path, "test") == ["test.jsonl"]


def test_a_link_to_a_folder_is_named_as_not_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "rows", "a.jsonl")
    (folder / "more").symlink_to(make(tmp_path / "other", "b.jsonl"))
    assert describe_listing(list_files(folder, "train"), folder) == [
        "files that are read: `a.jsonl`",
        "not read, a link to a folder: `more`",
    ]
    (folder / "a.jsonl").unlink()
    with pytest.raises(DataError, match="holds no file of rows") as caught:
        chosen(folder)
    assert caught.value.hint == "`more` is a link to a folder, which isn't followed: give that folder itself"


def test_a_suffix_within_a_name_is_no_format(tmp_path: Path) -> None:
    make(tmp_path, "data.csv.0.csv", "data.csv.1.csv")
    assert chosen(tmp_path) == ["data.csv.0.csv", "data.csv.1.csv"]


def test_a_link_to_nothing_is_no_less_rows(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    config = TrainConfig(dataset_name=str(tmp_path))
    for ask in (lambda: list(read_rows(config)), lambda: source_fingerprint(config)):
        with pytest.raises(DataError, match=r"can't read .*b\.jsonl"):
            ask()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_subfolder_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "lost+found/b.jsonl")
    (tmp_path / "lost+found").chmod(0)
    assert chosen(tmp_path) == ["a.jsonl"]
    make(tmp_path, "closed/b.jsonl")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(DataError, match=r"can't read .*closed.*Permission denied"):
            chosen(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_folder_of_everything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_MOST_ENTRIES", 3)
    make(tmp_path, "a.jsonl", "x/b.jsonl")
    assert chosen(tmp_path) == ["a.jsonl", "x/b.jsonl"]
    make(tmp_path, "x/c.jsonl")
    with pytest.raises(DataError, match="more than 3 files and folders"):
        chosen(tmp_path)


def test_the_log_names_what_is_read_and_what_is_not(
    model_of: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(
        tmp_path / "rows", *(f"train_{i:02}.jsonl" for i in range(12)), "test.jsonl", "more.jsonl", "a.xlsx"
    )
    config = TrainConfig(
        model_path=model_of("llama"), dataset_name=str(folder), train_split_ratio=1, home=tmp_path
    )
    with caplog.at_level(logging.INFO):
        start(config)
    first, *rest = [
        line.split("): ", 1)[1] for line in caplog.messages if line.startswith("`rows` (train): ")
    ]
    assert first == f"files that are read: {', '.join(f'`train_{i:02}.jsonl`' for i in range(8))} and 4 more"
    assert rest[:3] == [
        "not read, as others are named after the split: `more.jsonl`",
        "not read, of split `test`: `test.jsonl`",
        "not read, a spreadsheet: `a.xlsx`",
    ]


def test_a_run_of_the_first_version_goes_on_with_the_files_that_it_read(
    model_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "rows", "gsm-train.jsonl", "gsm-test.jsonl", "old/more.jsonl")
    config = small_config(
        model_of("llama"), folder, tmp_path / "home", field_mapping={"instruction": "text", "output": "text"}
    )
    then = folder / "gsm-test.jsonl", folder / "gsm-train.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "RENDERING_VERSION", 1)
        patched.setattr(prepare, "sources_fingerprint", lambda _: digest_of(*then))
        begun = start(config)
    check_resumable(begun.run, config)
    assert start(config).prepared_path == begun.prepared_path
    (folder / "gsm-test.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(Exception, match="has changed since this run was started"):
        check_resumable(begun.run, config)


def digest_of(*files: Path) -> str:
    """What the first version recorded of these files."""
    from hashlib import blake2b

    digest = blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.suffix}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def test_the_rows_of_subfolders_are_read(tmp_path: Path) -> None:
    make(tmp_path, "train/b.jsonl", "train/a/c.jsonl")
    rows = [row["text"] for _, row in read_rows(TrainConfig(dataset_name=str(tmp_path)))]
    assert rows == ["train/a/c.jsonl", "train/b.jsonl"]
