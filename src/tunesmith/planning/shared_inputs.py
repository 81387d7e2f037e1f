"""Which adapted layers are handed the same tensor: seen in one forward pass on tensors without data."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.compat import count_changes
from tunesmith.model.adapters.lora import find_plain_adapter
from tunesmith.model.kernels.attention import compute_logits
from tunesmith.planning.live_bytes import AnswersNo
from tunesmith.planning.made_up_batch import FEW_TOKENS, make_batch

logger = logging.getLogger(__name__)


def find_shared_inputs(model: Any) -> list[list[str]]:
    """Return the names of the adapted layers of the meta model that share an input, in the order of their calls.

    Only layers of one parent, with adapters alike, that run once in a forward pass. A model that can't be run without
    data has none.
    """
    calls: list[tuple[str, Tensor, tuple[Any, ...]]] = []

    def note(name: str, key: tuple[Any, ...]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            # The tensor is held: or another might come to have its id.
            calls.append((name, args[0], (*key, id(args[0]), count_changes(args[0]))))

        return hook

    handles = [
        layer.register_forward_pre_hook(
            note(name, (name.rpartition(".")[0], adapter, _dropout_of(layer, adapter)))
        )
        for name, layer in model.named_modules()
        if (adapter := find_plain_adapter(layer)) is not None
    ]
    try:
        with AnswersNo(), torch.no_grad():
            compute_logits(model, make_batch(FEW_TOKENS, FEW_TOKENS, is_flat=True))
    except Exception as error:  # a model's own code may fail on tensors without data in any way
        logger.debug("layers that share an input aren't found: %s", error)
        return []
    finally:
        for handle in handles:
            handle.remove()
    num_calls = Counter(name for name, _, _ in calls)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, _, key in calls:
        if num_calls[name] == 1:
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _dropout_of(layer: Any, adapter: str) -> float:
    dropout = layer.lora_dropout[adapter]
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0
