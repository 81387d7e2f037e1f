"""Activation checkpointing block by block: which blocks compute their activations again in the backward pass."""

from __future__ import annotations

from typing import Any

from torch import nn

from tunesmith.parallel.blocks import find_blocks


def find_decoder_blocks(model: Any) -> list[nn.Module]:
    """Return the blocks that text runs through, in order."""
    return find_blocks(model.get_decoder())


def recompute_all(model: Any) -> None:
    """Let every block of `model` compute its activations again."""
    model.gradient_checkpointing_enable({"use_reentrant": False})


def recompute_none(model: Any) -> None:
    """Let every block of `model` keep its activations, as a model does that was never told otherwise."""
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()


def recompute_first(model: Any, num_blocks: int) -> None:
    """Let the first `num_blocks` of the blocks that text runs through compute their activations again."""
    recompute_all(model)
    kept: list[Any] = find_decoder_blocks(model)[num_blocks:]
    for block in kept:
        block.gradient_checkpointing = False


def count_recomputed(model: Any) -> tuple[int, int]:
    """Return how many of the blocks are recomputed, and of how many; a model without known blocks is one."""
    blocks = find_decoder_blocks(model)
    if not (blocks and model.is_gradient_checkpointing):
        return int(model.is_gradient_checkpointing), len(blocks) or 1
    # Blocks of a model's own code may leave it to the model.
    return sum(getattr(block, "gradient_checkpointing", True) for block in blocks), len(blocks)


def describe_recomputation(num_recomputed: int, num_blocks: int) -> str:
    """Return in words how many blocks are recomputed: off, on, 7 of 32 blocks."""
    if num_recomputed in (0, num_blocks):
        return "on" if num_recomputed else "off"
    return f"{num_recomputed} of {num_blocks} blocks"
