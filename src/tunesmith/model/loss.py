"""Cross-entropy at the trained positions only.

Shapes: B sequences, T tokens, N trained positions, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.data.batches import Batch


def sum_cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the summed cross-entropy of the batch's N targets, in nats, float32; zero where N is 0.

    The hidden states are narrowed to the trained positions before the output layer, so that prompt
    positions cost no logits; what the model does with its logits (scales, caps) still applies.

    Under FSDP every rank must call it equally often.
    """
    with _narrow_head(model, batch.positions_N):
        logits_1NV = model(
            input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
        ).logits
    return F.cross_entropy(logits_1NV[0].float(), batch.targets_N, reduction="sum")


@contextmanager
def _narrow_head(model: Any, positions_N: Tensor) -> Iterator[None]:
    def narrow(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD, *others = arguments
        return (hidden_BTD.flatten(0, 1).index_select(0, positions_N).unsqueeze(0), *others)

    hook = model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        hook.remove()
