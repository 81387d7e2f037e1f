"""What dropout follows from tells every token from every other, and the same token in any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from support.runs import small_config, start
from tunesmith.data.batches import Batch, Sequences
from tunesmith.data.draws import Draws
from tunesmith.data.prepare import open_prepared
from tunesmith.data.token_set import Packs

DRAWS = Draws(seed=3, step=5)


def keys_by_example(batch: Batch) -> dict[bytes, list[int]]:
    """Return the keys of each example, by its tokens: all of them are different."""
    assert batch.draw_keys_BT is not None
    found = {}
    starts_N = (batch.position_ids_BT.flatten() == 0).nonzero().squeeze(1).tolist()
    for first, end in zip(starts_N, [*starts_N[1:], batch.input_ids_BT.numel()], strict=True):
        tokens = batch.input_ids_BT.flatten()[first:end]
        tokens = tokens[tokens != 0]  # without its row's padding
        found[tokens.numpy().tobytes()] = batch.draw_keys_BT.flatten()[first : first + len(tokens)].tolist()
    found.pop(b"", None)
    return found


def test_an_example_has_the_same_keys_in_any_batch(
    model_of: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    tokens = open_prepared(start(small_config(model_of("llama"), rows, tmp_path)).prepared_path).train
    packed, padded = (Sequences(tokens, packing, pad_token_id=0) for packing in (True, False))
    flat = Sequences(tokens, True, 0, flatten=True)
    packs = np.arange(6)
    examples = np.array(packed.examples(packs))
    expected = keys_by_example(padded.collate(examples, DRAWS))
    assert len(expected) == len(examples)
    assert keys_by_example(packed.collate(packs, DRAWS)) == expected
    assert keys_by_example(flat.collate(packs[::-1], DRAWS)) == expected
    halves = [keys_by_example(flat.collate(half, DRAWS)) for half in np.split(packs, 2)]
    assert halves[0] | halves[1] == expected
    repacked = packed.repack(Packs(examples[::-1].copy(), np.array([[0, 4], [4, len(examples)]])))
    assert keys_by_example(repacked.collate(np.arange(2), DRAWS)) == expected
    for other in (Draws(3, 6), Draws(4, 5)):
        found = keys_by_example(packed.collate(packs, other))
        assert not {key for keys in found.values() for key in keys} & {
            key for keys in expected.values() for key in keys
        }
    assert packed.collate(packs).draw_keys_BT is None


def test_tokens_of_a_step_share_keys_no_oftener_than_by_chance() -> None:
    rows, places = np.meshgrid(np.arange(-1, 400), np.arange(500), indexing="ij")
    keys = DRAWS.token_keys(rows, places)
    assert keys.shape == rows.shape
    # Of 200,500 numbers of 32 bits 5 are expected to be there twice.
    assert len(np.unique(keys)) > rows.size - 20
    # Each bit is as often one as zero, whatever the number that is counted up.
    bits = np.unpackbits(keys.view(np.uint8).reshape(*rows.shape, 4), axis=2)
    for axis, num in ((0, 401), (1, 500)):
        assert abs(bits.mean(axis=axis) - 0.5).max() < 6 * 0.5 / num**0.5


def test_keys_are_sent_with_the_batch(model_of: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    tokens = open_prepared(start(small_config(model_of("llama"), rows, tmp_path)).prepared_path).train
    batch = Sequences(tokens, True, 0).collate(np.arange(2), DRAWS)
    sent = batch.to(torch.device("meta")).draw_keys_BT
    assert sent is not None
    assert (sent.device.type, sent.shape, sent.dtype) == ("meta", batch.input_ids_BT.shape, torch.int32)


def test_torch_is_seeded_by_the_rows_that_are_run_at_once() -> None:
    seeds = [
        draws.seed_for(np.array(rows, np.int64))
        for draws in (DRAWS, Draws(3, 6), Draws(4, 5))
        for rows in ([], [0], [1], [0, 1], [1, 0])
    ]
    assert len(set(seeds)) == len(seeds)
    assert seeds[1] == Draws(3, 5).seed_for(np.array([0]))
