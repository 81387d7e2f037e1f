"""The tokens that a training teaches its model to end with."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from support.tokenizers import build_tokenizer
from tunesmith.data.end_tokens import find_end_tokens

TEXT, START, END = 0, 1, 2  # special tokens of the tokenizer; all others are text
WORD = 40
Row = list[tuple[int, bool]]


def turn(end: int, length: int = 3) -> Row:
    """Return a question and an answer of `length` tokens with its end."""
    return [(START, False), (WORD, False), *[(WORD, True)] * (length - 1), (end, True)]


def write(path: Path, batches: list[list[Row]]) -> Path:
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.bool_()))])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for rows in batches:
            columns = [[[token[column] for token in row] for row in rows] for column in range(2)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return path


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([turn(END)], (END,)),
        ([turn(TEXT), turn(END), turn(END)], (END, TEXT)),
        # A tool call in the middle of a conversation ends otherwise than the answer does.
        ([turn(START) + turn(END)], (START, END)),
        ([turn(END)[:-1]], ()),  # text that a person wrote, trained to its last word
        ([turn(END, length=14)], ()),  # sixteen tokens: as long as a sequence, so this may be a cut
        ([turn(END, length=20)], (END,)),  # longer: left whole, to be cut later
        ([[(START, False), (END, False), (WORD, True)]], ()),
    ],
)
def test_the_special_tokens_behind_trained_stretches_are_the_ends(
    rows: list[Row], expected: tuple[int, ...], tmp_path: Path
) -> None:
    path = write(tmp_path / "training.arrow", [rows])
    assert find_end_tokens(path, build_tokenizer("chatml"), 16) == expected


def test_of_many_examples_some_are_looked_at_wherever_they_stand(tmp_path: Path) -> None:
    batches = [[turn(END)] * 4000, [turn(END)] * 4000, [turn(TEXT)] * 900]
    path = write(tmp_path / "training.arrow", batches)
    assert find_end_tokens(path, build_tokenizer("chatml"), 64) == (END, TEXT)
