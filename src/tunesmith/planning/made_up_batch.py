"""A batch of which nothing counts but its shape."""

from __future__ import annotations

import torch

from tunesmith.data.batches import Batch

FEW_TOKENS = 8


def make_batch(num_tokens: int, example_tokens: int, is_flat: bool, device_type: str = "meta") -> Batch:
    """Return a batch, without data if that isn't told otherwise: one row that holds the examples, or a row for each."""
    starts = [*range(0, num_tokens, example_tokens), num_tokens]
    ids_N = torch.zeros(num_tokens, dtype=torch.int64, device=device_type)
    ids_BT = ids_N.view(1 if is_flat else -1, num_tokens if is_flat else example_tokens)
    # Every token but an example's first is a target; one more costs nothing.
    return Batch(ids_BT, ids_BT, ids_N, ids_N, torch.tensor(starts, dtype=torch.int32), example_tokens)
