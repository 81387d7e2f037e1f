"""Adapters that begin as a part of the base weights (PiSSA, OLoRA), with the base left as it was published.

PEFT takes that part away from the weights. Here it is taken away beside them: by a second adapter, frozen, which is what
the first one began as, with the opposite sign. So the base stays the one that everybody has, and the two adapters are
together a plain LoRA of twice the rank on it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ConfigError

OFFSET = "offset"
"""Name of the frozen adapter."""


@torch.no_grad()
def begin_off_base(model: Any, start: str, settings: Any, dtype: torch.dtype) -> None:
    """Let the active adapter of PEFT's `model` begin as `start` says, and a frozen one, of PEFT's `settings`, take that away.

    Both begin as numbers that `dtype`, in which they are computed with, holds: so that they cancel out. On the meta
    device they have no numbers.

    Raises:
        ConfigError: a layer can't begin so.
    """
    (name,) = model.active_adapters
    for path, layer in model.named_modules():
        if name in getattr(layer, "lora_A", {}):
            _begin(layer, path, name, start)
            for factor in (layer.lora_A[name], layer.lora_B[name]):
                factor.weight.data = factor.weight.data.to(dtype).float()
    model.add_adapter(OFFSET, settings)
    for layer in model.modules():
        if OFFSET in getattr(layer, "lora_A", {}):
            layer.lora_A[OFFSET].weight.data = layer.lora_A[name].weight.data.clone()
            layer.lora_B[OFFSET].weight.data = -layer.lora_B[name].weight.data
    model.base_model.set_adapter([name, OFFSET])
    for parameter_name, parameter in model.named_parameters():
        if f".{OFFSET}" in parameter_name:
            parameter.requires_grad_(False)


def _begin(layer: Any, path: str, name: str, start: str) -> None:
    base = layer.get_base_layer()
    weight = base.weight.data
    if layer.r[name] > min(weight.shape):
        raise ConfigError(
            f"`init_lora_weights` is {start}, which gives `{path}` ({weight.shape[0]}×{weight.shape[1]}) no more than "
            f"{min(weight.shape)} directions, and `lora_rank` is {layer.r[name]}",
            "lower --lora_rank",
        )
    if start == "olora" and isinstance(base, Conv1D):
        raise ConfigError(
            f"`init_lora_weights` is olora, which PEFT has for linear layers alone, not for `{path}`",
            "take pissa, or leave init_lora_weights out",
        )
    if weight.is_meta:
        return
    base.weight.data = weight.to(torch.float32, copy=True)
    try:
        if start == "olora":
            layer.olora_init(name)
        else:
            layer.pissa_init(name, start)
    finally:
        base.weight.data = weight  # mapped from its file, as it was
