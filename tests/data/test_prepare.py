"""Prepared data: split, tokenized, packed; atomic, cached, the same for every process that asks."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.paths import REPOSITORY, SHARED, TESTS
from support.tokenizers import build_tokenizer, train_byte_bpe
from tunesmith.config import TrainConfig
from tunesmith.data.packing import WINDOW_EXAMPLES, pack_examples
from tunesmith.data.prepare import Prepared, open_prepared, prepare
from tunesmith.data.split import check_sources
from tunesmith.data.token_set import TokenSet
from tunesmith.errors import ConfigError, DataError, ModelError

SETS = ("training", "validation", "test")
GSM8K = SHARED / "data" / "gsm8k_train.jsonl"


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def alpaca(number: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"Say {i}.", "input": "" if i % 3 else "now", "output": "so " * (i % 13 + 1)}
        for i in range(number)
    ]


def prepare_rows(
    tmp_path: Path, rows: Iterable[dict[str, Any]], kind: str = "byte_bpe", **given: Any
) -> Prepared:
    source = write_rows(tmp_path / "rows.jsonl", rows)
    config = TrainConfig(dataset_name=str(source), **{"max_seq_length": 128, **given})
    return prepare(config, build_tokenizer(kind), tmp_path / "datasets")


def read_set(prepared: Prepared, name: str) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (prepared.data_dir / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]


def content(tokens: TokenSet) -> list[tuple[list[int], list[bool]]]:
    examples = (tokens.example(i) for i in range(tokens.num_examples))
    return [(ids.tolist(), trained.tolist()) for ids, trained in examples]


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


# The split.


def test_a_thousand_rows_split_into_the_shares_asked_for(tmp_path: Path) -> None:
    prepared = prepare_rows(tmp_path, alpaca(1000))
    assert [len(read_set(prepared, name)) for name in SETS] == [900, 50, 50]
    assert prepared.stats.train.rows == 900
    assert prepared.stats.test_rows == 50
    assert set(read_set(prepared, "training")[0]) == {"input", "output"}


def test_sets_keep_the_order_of_the_source_and_lose_no_row(tmp_path: Path) -> None:
    rows = alpaca(300)
    prepared = prepare_rows(tmp_path, rows, train_split_ratio=0.6)
    order = {json.dumps(row, sort_keys=True): i for i, row in enumerate(rows)}
    places = []
    for name in SETS:
        of_set = []
        for row in read_set(prepared, name):
            instruction, value = row["input"].removeprefix("### Instruction:\n").split("\n ### Input:\n")
            source = {
                "instruction": instruction,
                "input": value.removesuffix("\n"),
                "output": row["output"][14:],
            }
            of_set.append(order[json.dumps(source, sort_keys=True)])
        assert of_set == sorted(of_set)
        places += of_set
    assert sorted(places) == list(range(300))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.sampled_from([0.3, 0.5, 0.9, 0.99]),
       st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 5))  # fmt: skip
def test_identical_rows_share_a_side_and_some_train_and_some_are_held_out(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], ratio: float, test_ratio: float, seed: int
) -> None:
    prepared = prepare_rows(
        tmp_path_factory.mktemp("split"), [{"text": f"row {number}"} for number in numbers],
        train_split_ratio=ratio, val_test_split_ratio=test_ratio, seed=seed,
    )  # fmt: skip
    sides = [{row["output"] for row in read_set(prepared, name)} for name in SETS]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert sum(len(read_set(prepared, name)) for name in SETS) == len(numbers)
    assert sides[0]
    assert bool(sides[1] | sides[2]) == (len(set(numbers)) > 1)
    if test_ratio < 1 and len(set(numbers)) > 1:
        assert sides[1]
    if test_ratio == 0:
        assert not sides[2]
    if test_ratio == 1:
        assert not sides[1]
    assert (prepared.validation is None) == (not sides[1])


def test_a_share_that_rounds_to_no_row_still_holds_one_out(tmp_path: Path) -> None:
    prepared = prepare_rows(tmp_path, alpaca(3), train_split_ratio=0.99)
    assert [len(read_set(prepared, name)) for name in SETS] == [2, 1, 0]


def test_a_cut_falls_on_the_nearest_border_between_duplicates(tmp_path: Path) -> None:
    prepared = prepare_rows(tmp_path, [{"text": f"row {i % 10}"} for i in range(100)], train_split_ratio=0.58)
    assert [len(read_set(prepared, name)) for name in SETS] == [60, 20, 20]


def test_with_a_ratio_of_one_everything_trains(tmp_path: Path) -> None:
    prepared = prepare_rows(tmp_path, alpaca(50), train_split_ratio=1.0)
    assert [len(read_set(prepared, name)) for name in SETS] == [50, 0, 0]
    assert prepared.validation is None
    assert prepared.stats.validation is None


def test_the_split_follows_the_seed_alone(tmp_path: Path) -> None:
    first = prepare_rows(tmp_path / "a", alpaca(100))
    again = prepare_rows(tmp_path / "b", alpaca(100))
    other = prepare_rows(tmp_path / "c", alpaca(100), seed=1)
    assert read_set(first, "test") == read_set(again, "test")
    assert read_set(first, "test") != read_set(other, "test")


def test_more_rows_move_few_old_ones(tmp_path: Path) -> None:
    """A row's side follows from its hash, so a data set that grows keeps most of its test set."""
    old = {row["input"] for row in read_set(prepare_rows(tmp_path / "a", alpaca(1000)), "training")}
    new = {row["input"] for row in read_set(prepare_rows(tmp_path / "b", alpaca(1100)), "training")}
    assert len(old - new) < 50


# Examples, truncation, counts.


def test_a_token_set_holds_the_labelled_examples_of_its_rows(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("byte_bpe")
    prepared = prepare_rows(tmp_path, alpaca(700))
    rows = read_set(prepared, "training")
    assert prepared.train.num_examples == len(rows) == 630
    for i in (0, 1, 511, 512, 513, 629):
        ids, trained = prepared.train.example(i)
        row = rows[int(prepared.train.rows[i])]
        assert (ids.dtype, trained.dtype) == (np.int32, np.bool_)
        assert tokenizer.decode(ids) == row["input"] + row["output"] + "<|endoftext|>"
        assert tokenizer.decode(ids[trained]) == row["output"] + "<|endoftext|>"
        assert (len(ids), trained.sum()) == (prepared.train.lengths[i], prepared.train.num_trained[i])
    with pytest.raises(IndexError):
        prepared.train.example(630)


def test_long_examples_are_cut_at_the_right_or_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"q": "short ", "a": "yes"},
        {"q": "short ", "a": "x y z " * 40},
        {"q": "x y z " * 40, "a": "yes"},
        {"q": "short ", "a": ""},
    ]
    prepared = prepare_rows(
        tmp_path, rows, train_split_ratio=1.0, input_template="{q}", output_template="{a}", max_seq_length=32
    )
    stats = prepared.stats.train
    assert (stats.rows, stats.examples, stats.truncated, stats.dropped, stats.untrained) == (4, 2, 1, 2, 1)
    assert prepared.train.rows.tolist() == [0, 1]
    assert prepared.train.lengths.tolist() == [prepared.train.lengths[0], 32]
    ids, trained = prepared.train.example(1)
    assert ids[-1] != build_tokenizer("byte_bpe").eos_token_id
    assert trained[-1]
    assert stats.longest == 32
    assert stats.tokens == prepared.train.lengths.sum()
    assert stats.trained_tokens == prepared.train.num_trained.sum()


def test_conversations_without_an_answer_are_dropped_and_counted(tmp_path: Path) -> None:
    question = {"role": "user", "content": "Hi"}
    rows = [{"messages": [question]}, {"messages": [question, {"role": "assistant", "content": "Hello"}]}]
    prepared = prepare_rows(tmp_path, rows, "chatml", train_split_ratio=1.0)
    assert prepared.row_format == "messages"
    assert (prepared.stats.train.examples, prepared.stats.train.dropped) == (1, 1)
    assert read_set(prepared, "training") == rows


def test_several_processes_write_what_one_writes(tmp_path: Path) -> None:
    rows = alpaca(8000)
    one = prepare_rows(tmp_path / "one", rows, train_split_ratio=1.0, num_proc=1)
    two = prepare_rows(tmp_path / "two", rows, train_split_ratio=1.0, num_proc=2)
    assert one.fingerprint == two.fingerprint
    assert content(one.train) == content(two.train)
    assert one.train.rows.tolist() == two.train.rows.tolist() == list(range(8000))
    assert one.stats == two.stats
    assert everything_in(one.folder) == everything_in(two.folder)


def test_an_error_in_one_of_several_processes_names_the_source_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": [{"role": "user", "content": f"Hi {i}"}, turns[1]]} for i in range(8000)]
    rows[7000]["messages"][0]["role"] = "critic"
    with pytest.raises(
        DataError, match=r"rows.jsonl`, line 7001: the chat template refuses .* unknown role critic"
    ):
        prepare_rows(tmp_path, rows, "qwen3", train_split_ratio=1.0, num_proc=2)
    assert everything_in(tmp_path) == {"rows.jsonl"}


# Packing.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=200), st.integers(0, 3))
def test_packs_hold_every_example_once_and_never_too_much(lengths: list[int], seed: int) -> None:
    of_example = np.array(lengths, dtype=np.int32)
    examples, bounds = pack_examples(of_example, 40, seed)
    packs = [examples[start:end] for start, end in bounds]
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(0 < of_example[pack].sum() <= 40 for pack in packs)
    again = pack_examples(of_example, 40, seed)
    assert np.array_equal(examples, again[0])
    assert np.array_equal(bounds, again[1])


def test_a_million_lengths_pack_well_and_mixed_in_seconds() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.7, 1_000_000), 5, 2048).astype(np.int32)
    start = time.monotonic()
    examples, bounds = pack_examples(lengths, 2048, 1)
    assert time.monotonic() - start < 20
    assert lengths.sum() / (len(bounds) * 2048) > 0.98
    # Neither the lengths nor the places in the source drift along the packs.
    first, last = ([examples[a:b] for a, b in part] for part in (bounds[:2000], bounds[-2000:]))
    means = [lengths[np.concatenate(part)].mean() for part in (first, last)]
    assert abs(means[0] - means[1]) < 0.05 * lengths.mean()
    assert all(abs(np.concatenate(part).mean() - 500_000) < 25_000 for part in (first, last))
    sizes = (bounds[:, 1] - bounds[:, 0]).astype(float)
    assert abs(np.corrcoef(sizes[:-1], sizes[1:])[0, 1]) < 0.02


def test_packs_hold_examples_of_all_lengths() -> None:
    random = np.random.default_rng(0)
    lengths = random.lognormal(4, 0.8, 20_000).astype(np.int32).clip(4, 512)
    _, bounds = pack_examples(lengths, 2048, 1)
    counts = bounds[:, 1] - bounds[:, 0]
    # Random draws until the pack is full would give about this spread; packs by length give several times it.
    spread = counts.mean() ** 0.5 * lengths.std() / lengths.mean()
    assert counts.std() < 1.3 * spread
    assert lengths.sum() / (len(bounds) * 2048) > 0.98


@pytest.mark.parametrize("capacity", [512, 1024])
def test_packs_of_a_few_examples_are_full_and_mixed(capacity: int) -> None:
    # The lengths of word problems: one to three of them fill a pack of 512.
    lengths = np.random.default_rng(0).lognormal(5.2, 0.37, 7_500).astype(np.int32).clip(60, 512)
    examples, bounds = pack_examples(lengths, capacity, 0)
    assert lengths.sum() / (len(bounds) * capacity) > 0.98
    # Were packs drawn at random, the mean lengths of those of n examples would vary by this variance ÷ n.
    packs = [lengths[examples[start:end]] for start, end in bounds]
    ratio = np.mean([len(pack) * (pack.mean() - lengths.mean()) ** 2 for pack in packs]) / lengths.var()
    assert ratio < 1.3


@pytest.mark.parametrize("capacity", [8, 3 * WINDOW_EXAMPLES + 1])
def test_packs_go_across_windows(capacity: int) -> None:
    lengths = np.full(2 * WINDOW_EXAMPLES + 2, 2, dtype=np.int32)
    examples, bounds = pack_examples(lengths, capacity, 0)
    assert sorted(examples.tolist()) == list(range(len(lengths)))
    sizes = bounds[:, 1] - bounds[:, 0]
    assert sizes.max() == capacity // 2
    assert (sizes < capacity // 2).sum() == 1


@pytest.mark.skipif(not GSM8K.exists(), reason=f"no GSM8K at {GSM8K.parent.name}/{GSM8K.name}")
def test_word_problems_pack_to_98_percent_at_512_tokens(tmp_path: Path) -> None:
    texts = [
        f"{row['question']}\n{row['answer']}"
        for row in map(json.loads, GSM8K.read_text("utf-8").splitlines())
    ]
    tokenizer = train_byte_bpe(texts[:3000], 4096)
    config = TrainConfig(
        dataset_name=str(GSM8K), input_template="{question}\n", output_template="{answer}", max_seq_length=512
    )
    prepared = prepare(config, tokenizer, tmp_path)
    assert prepared.stats.train.packing_efficiency >= 0.98
    assert prepared.stats.train.rows == round(7473 * 0.9)
    lengths = [prepared.train.lengths[pack].sum() for pack in prepared.train.packs]
    assert max(lengths) <= 512
    assert sum(lengths) == prepared.stats.train.tokens


# Cache and fingerprints.


def test_the_second_time_finds_what_the_first_wrote(tmp_path: Path) -> None:
    first = prepare_rows(tmp_path, alpaca(50))
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    again = prepare_rows(tmp_path, alpaca(50))
    assert (again.folder, again.fingerprint, again.stats) == (first.folder, first.fingerprint, first.stats)
    assert {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")} == before
    assert len(first.fingerprint) == 16
    assert first.data_dir.parent == tmp_path / "datasets"


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"train_split_ratio": 0.8},
        {"val_test_split_ratio": 0.4},
        {"input_template": "{instruction}\n"},
        {"output_template": "{output}"},
        {"field_mapping": {"input": "instruction"}},
        {"max_seq_length": 64},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_setting_that_shapes_the_data_prepares_them_anew(tmp_path: Path, changed: dict[str, Any]) -> None:
    first = prepare_rows(tmp_path, alpaca(50))
    other = prepare_rows(tmp_path, alpaca(50), **changed)
    assert other.fingerprint != first.fingerprint
    assert (other.data_dir == first.data_dir) == (changed == {"max_seq_length": 64})


@pytest.mark.parametrize(
    "same", [{"num_proc": 1}, {"field_mapping": {"input": "input"}}, {"learning_rate": 1.0}]
)
def test_a_setting_that_does_not_shape_the_data_finds_them(tmp_path: Path, same: dict[str, Any]) -> None:
    assert prepare_rows(tmp_path, alpaca(50), **same).folder == prepare_rows(tmp_path, alpaca(50)).folder


def test_another_source_or_tokenizer_prepares_anew(tmp_path: Path) -> None:
    first = prepare_rows(tmp_path, alpaca(50))
    assert prepare_rows(tmp_path, alpaca(51)).data_dir != first.data_dir
    of_llama = prepare_rows(tmp_path, alpaca(50), "llama2")
    assert of_llama.data_dir == first.data_dir
    assert of_llama.folder != first.folder
    assert of_llama.fingerprint != first.fingerprint
    with_template = prepare_rows(tmp_path, alpaca(50), "chatml")
    other_template = prepare_rows(tmp_path, alpaca(50), "qwen3")
    assert with_template.fingerprint != other_template.fingerprint


def test_open_prepared_imports_neither_transformers_nor_datasets(tmp_path: Path) -> None:
    prepared = prepare_rows(tmp_path, alpaca(50))
    code = (
        "import sys; from pathlib import Path; from tunesmith.data.prepare import open_prepared\n"
        f"train = open_prepared(Path({str(prepared.folder)!r})).train\n"
        "print(train.num_examples, len(train.packs), *{'transformers', 'datasets', 'torch'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=child_environ(), capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["45", str(len(prepared.train.packs))]


def test_prepared_data_of_a_newer_format_are_refused(tmp_path: Path) -> None:
    folder = prepare_rows(tmp_path, alpaca(50)).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(DataError, match="have format 99"):
        open_prepared(folder)
    with pytest.raises(DataError, match="no prepared data"):
        open_prepared(tmp_path / "none")


# data_dir.


def test_data_dir_takes_the_sets_and_is_found_again(tmp_path: Path) -> None:
    chosen = tmp_path / "a" / "sets"
    first = prepare_rows(tmp_path, alpaca(50), data_dir=chosen)
    assert first.data_dir == chosen
    assert {f"{name}.jsonl" for name in SETS} < {path.name for path in chosen.iterdir()}
    assert prepare_rows(tmp_path, alpaca(50), data_dir=chosen).folder == first.folder
    assert not (tmp_path / "datasets").exists()
    # Another length is another set of tokens beside the same rows.
    assert prepare_rows(tmp_path, alpaca(50), data_dir=chosen, max_seq_length=64).data_dir == chosen


def test_data_dir_with_sets_of_other_settings_is_never_overwritten(tmp_path: Path) -> None:
    chosen = tmp_path / "sets"
    prepare_rows(tmp_path, alpaca(50), data_dir=chosen)
    before = everything_in(chosen)
    with pytest.raises(DataError, match="other settings: train_split_ratio, seed"):
        prepare_rows(tmp_path, alpaca(50), data_dir=chosen, seed=1, train_split_ratio=0.8)
    assert everything_in(chosen) == before


def test_data_dir_with_other_files_is_refused_and_an_empty_one_is_used(tmp_path: Path) -> None:
    chosen = tmp_path / "sets"
    chosen.mkdir()
    (chosen / "training.jsonl").write_text("mine\n")
    with pytest.raises(DataError, match=r"is not empty.*training.jsonl"):
        prepare_rows(tmp_path, alpaca(50), data_dir=chosen)
    assert (chosen / "training.jsonl").read_text() == "mine\n"
    (chosen / "training.jsonl").unlink()
    assert prepare_rows(tmp_path, alpaca(50), data_dir=chosen).data_dir == chosen


def test_sets_that_were_edited_are_refused(tmp_path: Path) -> None:
    prepared = prepare_rows(tmp_path, alpaca(50))
    with (prepared.data_dir / "test.jsonl").open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(DataError, match=r"test.jsonl` was changed or removed"):
        prepare_rows(tmp_path, alpaca(50))


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "datasets").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="can't write the prepared data"):
        prepare_rows(tmp_path, alpaca(5))


def test_a_set_of_which_most_rows_are_lost_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = [{"text": None}] * 30
    kept = [{"text": f"row {i}"} for i in range(20)]
    prepare_rows(tmp_path, [*kept, *lost], train_split_ratio=1)
    assert "30 of the 50 training rows have nothing to train" in caplog.text
    caplog.clear()
    prepare_rows(tmp_path, [*kept, *lost[:10]], train_split_ratio=1)
    assert "nothing to train" not in caplog.text


# Bad input leaves nothing behind.


@pytest.mark.parametrize(
    ("rows", "given_settings", "error", "message"),
    [
        ([], {}, DataError, "holds no rows"),
        ([{"q": "a"}], {}, DataError, "no way to read"),
        (
            [*alpaca(300), {"instruction": "a", "input": "b"}],
            {},
            DataError,
            "line 301 has no column `output`",
        ),
        ([*alpaca(300), {**alpaca(1)[0], "output": ["x"]}], {}, DataError, "column `output` of .*line 301"),
        (alpaca(3), {"input_template": "{question}"}, DataError, r"\{question\}"),
        (alpaca(3), {"input_template": "{instruction"}, ConfigError, "without its partner"),
        ([{"text": ""}] * 3, {}, DataError, "no token of .* would be trained: none of its 3 rows"),
        (alpaca(30), {"max_seq_length": 4}, DataError, "prompts alone fill max_seq_length"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, DataError, "has no chat template"),
    ],
)
def test_bad_data_end_with_one_error_and_leave_nothing(
    tmp_path: Path, rows: list[dict[str, Any]], given_settings: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        prepare_rows(tmp_path, rows, **given_settings)
    assert caught.value.hint
    assert caught.value.exit_code == 2
    assert everything_in(tmp_path) == {"rows.jsonl"}


def test_half_a_surrogate_pair_is_refused_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    config = TrainConfig(dataset_name=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="line 2 holds half a surrogate pair"):
        prepare(config, build_tokenizer("byte_bpe"), tmp_path / "datasets")


def test_a_tokenizer_without_an_end_token_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tokenizer = pickle.loads(pickle.dumps(build_tokenizer("byte_bpe")))
    tokenizer.eos_token = None
    config = TrainConfig(dataset_name=str(write_rows(tmp_path / "rows.jsonl", alpaca(3))))
    with pytest.raises(ModelError, match="no end token"):
        prepare(config, tokenizer, tmp_path / "datasets")
    assert not (tmp_path / "datasets").exists()


def test_check_sources_reads_only_the_first_rows(tmp_path: Path) -> None:
    rows = [*alpaca(300), {"instruction": "a"}]
    config = TrainConfig(dataset_name=str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert check_sources(config)[0].name == "template"


# Other processes.


def child_environ() -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), str(REPOSITORY / "src")])
    return {**os.environ, "PYTHONPATH": path}


_PREPARE = """
import logging, sys
from pathlib import Path
from support.tokenizers import build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.data.prepare import prepare
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
config = TrainConfig(dataset_name=sys.argv[1], num_proc=1)
prepared = prepare(config, build_tokenizer("byte_bpe"), Path(sys.argv[2]))
print("prepared", prepared.fingerprint, prepared.folder.stat().st_mtime_ns)
"""


def start_preparing(source: Path, datasets_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PREPARE, str(source), str(datasets_dir)]
    return subprocess.Popen(command, env=child_environ(), stdout=subprocess.PIPE, text=True)


def test_two_processes_that_prepare_at_once_do_it_once(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", alpaca(8000))
    processes = [start_preparing(source, tmp_path / "datasets") for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len({text.splitlines()[-1] for text in printed}) == 1
    (folder,) = (tmp_path / "datasets").iterdir()
    assert not (folder / ".preparing").exists()


def test_what_a_killed_process_left_is_cleared_and_prepared_anew(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", alpaca(20_000))
    datasets_dir = tmp_path / "datasets"
    process = start_preparing(source, datasets_dir)
    deadline = time.monotonic() + 60
    while not list(datasets_dir.glob("*/.preparing/tokens-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (torn,) = datasets_dir.iterdir()
    assert (torn / ".preparing").exists()
    assert not (torn / "split.json").exists()
    # As far as a writer may get before split.json.
    (torn / ".preparing" / "test.jsonl").rename(torn / "test.jsonl")
    config = TrainConfig(dataset_name=str(source), num_proc=1)
    prepared = prepare(config, build_tokenizer("byte_bpe"), datasets_dir)
    assert prepared.data_dir == torn
    assert prepared.stats.train.rows == 18_000
    assert not (torn / ".preparing").exists()


@pytest.mark.parametrize("content", [None, "", '{"format_ver'])
def test_tokens_that_a_lost_machine_left_torn_are_prepared_anew(tmp_path: Path, content: str | None) -> None:
    config = TrainConfig(dataset_name=str(write_rows(tmp_path / "rows.jsonl", alpaca(50))), num_proc=1)
    tokenizer = build_tokenizer("byte_bpe")
    prepared = prepare(config, tokenizer, tmp_path / "datasets")
    manifest = prepared.folder / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    again = prepare(config, tokenizer, tmp_path / "datasets")
    assert again.folder == prepared.folder
    assert np.array_equal(again.train.lengths, prepared.train.lengths)


_MEASURE = """
import resource, sys
from pathlib import Path
from support.tokenizers import build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.data.prepare import prepare
tokenizer = build_tokenizer("byte_bpe")
for source in sys.argv[2:]:
    config = TrainConfig(dataset_name=source, num_proc=1)
    prepared = prepare(config, tokenizer, Path(sys.argv[1]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_stays_flat_when_rows_are_many(tmp_path: Path) -> None:
    small = write_rows(tmp_path / "small.jsonl", alpaca(6_000))
    large = write_rows(tmp_path / "large.jsonl", alpaca(100_000))
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "datasets"), str(small), str(large)]
    ran = subprocess.run(command, env=child_environ(), capture_output=True, text=True, check=True)
    before, after = (int(line) / 1024 for line in ran.stdout.split())
    # The 94,000 more rows are 7 MiB of text, and as Python objects far more than what is allowed.
    assert after - before < 10


def test_conversations_that_differ_in_their_ids_alone_stay_on_one_side(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [{"messages": [{**message, "id": f"{i}"} for message in said]} for i in range(50)]
    rows += [{"messages": [said[0], {"role": "assistant", "content": f"hello {i}"}]} for i in range(50)]
    config = TrainConfig(dataset_name=str(write_rows(tmp_path / "rows.jsonl", rows)), num_proc=1)
    config = config.model_copy(update={"train_split_ratio": 0.5})
    prepared = prepare(config, build_tokenizer("chatml"), tmp_path / "datasets")
    sides = [
        sum('"hello"' in line for line in (prepared.data_dir / f"{name}.jsonl").read_text().splitlines())
        for name in ("training", "validation", "test")
    ]
    assert sorted(sides) == [0, 0, 50]


def test_duplicates_are_counted_once_per_side(tmp_path: Path) -> None:
    rows = [{"text": f"row {i % 40}"} for i in range(400)]
    prepared = prepare_rows(tmp_path, rows, train_split_ratio=0.5)
    of_set = [Counter(row["output"] for row in read_set(prepared, name)) for name in SETS]
    assert all(count == 10 for counts in of_set for count in counts.values())
    assert [sum(counts.values()) for counts in of_set] == [200, 100, 100]
