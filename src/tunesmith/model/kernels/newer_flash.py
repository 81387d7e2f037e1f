"""A newer FlashAttention beneath torch's own functions, where one is installed and the GPU has it.

`varlen` and SDPA take it then. Shapes: T tokens, H heads, K of them for keys and values, D head width.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.kernels.attention import attend_within_examples

logger = logging.getLogger(__name__)

# torch's names, the fastest first: FA4 is of the package flash-attn-4, FA3 of flash_attn_3. None, which leaves torch
# its FlashAttention 2, until they are measured: they round otherwise, and torch calls them prototypes.
NEWER: tuple[str, ...] = ()

# Major compute capabilities that have one.
_GPUS = {"FA4": (9, 10), "FA3": (9,)}

_LENGTHS = (96, 32)
_TOLERANCE = 2e-2


def activate_newer_flash(device: torch.device, model: nn.Module) -> str | None:
    """Let torch attend with the first of `NEWER` that works on this GPU, and return its name; None: with its own.

    It works if attention of heads as the model's, and its gradients, come out as before.
    """
    if not NEWER or device.type != "cuda":
        return None
    major, _ = torch.cuda.get_device_capability(device)
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    num_heads = config.num_attention_heads
    num_groups = getattr(config, "num_key_value_heads", None) or num_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return activate_first(
        [name for name in NEWER if major in _GPUS[name]], device, num_heads, num_groups, width
    )


def activate_first(
    names: list[str], device: torch.device, num_heads: int, num_groups: int, width: int
) -> str | None:
    """Do so with the first of `names`, whatever the device is."""
    from torch.nn.attention import (
        activate_flash_attention_impl,
        current_flash_attention_impl,
        restore_flash_attention_impl,
    )

    expected = _attend(device, num_heads, num_groups, width) if names else []
    for name in names:
        try:
            activate_flash_attention_impl(name)
            for found, wanted in zip(_attend(device, num_heads, num_groups, width), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE)
        except Exception as error:  # of another package, whose kernels may be compiled here and now
            logger.warning("%s gives way to FlashAttention 2: %s: %s", name, type(error).__name__, error)
            if current_flash_attention_impl() is not None:
                restore_flash_attention_impl()
        else:
            return name
    return None


def _attend(device: torch.device, num_heads: int, num_groups: int, width: int) -> list[Tensor]:
    """Return what comes out of an attention over two examples of random states, and its gradients."""
    generator = torch.Generator(device).manual_seed(0)
    query_1HTD, key_1KTD, value_1KTD = (
        torch.randn(
            1, heads, sum(_LENGTHS), width, generator=generator, device=device, dtype=torch.bfloat16
        ).requires_grad_()
        for heads in (num_heads, num_groups, num_groups)
    )
    starts = torch.tensor([0, _LENGTHS[0], sum(_LENGTHS)], dtype=torch.int32, device=device)
    with torch.enable_grad():
        output, _ = attend_within_examples(
            nn.Identity(),
            query_1HTD,
            key_1KTD,
            value_1KTD,
            None,
            cu_seq_lens_q=starts,
            max_length_q=max(_LENGTHS),
        )
        gradients = torch.autograd.grad(output.float().square().sum(), [query_1HTD, key_1KTD, value_1KTD])
    return [output.detach(), *gradients]
