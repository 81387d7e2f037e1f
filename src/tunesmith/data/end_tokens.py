"""The tokens that a training taught its model to end with, read from its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SAMPLE = 4096


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Return the ids of the tokens that stand for no text."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def find_end_tokens(
    arrow_file: Path, tokenizer: PreTrainedTokenizerFast, max_seq_length: int
) -> tuple[int, ...]:
    """Return the special tokens that trained stretches end with, the commonest first, of some thousand examples.

    What ends where a sequence does was cut there. An answer in the middle of a conversation counts as the last one does.

    Raises:
        OSError: the file is absent or torn.
    """
    with pa.memory_map(str(arrow_file)) as source, pa.ipc.open_file(source) as reader:
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        firsts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        total = int(firsts[-1])
        counts: dict[int, int] = {}
        # Spread evenly: data sets that are mixed may end in different ways.
        for record in np.unique(np.linspace(0, total - 1, min(total, _SAMPLE), dtype=np.int64)):
            at = int(np.searchsorted(firsts, record, "right")) - 1
            row = int(record - firsts[at])
            ids, trained = (
                batches[at][column][row].values.to_numpy(zero_copy_only=False) for column in range(2)
            )
            ends = np.flatnonzero(trained & ~np.append(trained[1:], False))
            for end in ends[ends != max_seq_length - 1]:
                counts[int(ids[end])] = counts.get(int(ids[end]), 0) + 1
    special = special_tokens(tokenizer)
    return tuple(sorted(special & counts.keys(), key=lambda token: (-counts[token], token)))
