"""The model's repeated blocks."""

from __future__ import annotations

from torch import nn

from tunesmith.compat import block_classes


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the model's repeated blocks, by the class names that transformers keeps for splitting."""
    names = set().union(*(block_classes(module) for module in model.modules()))
    # A sharded block has a class of its own, made from the block's.
    blocks = [
        module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}
    ]
    inner = {id(child) for block in blocks for child in block.modules() if child is not block}
    return [block for block in blocks if id(block) not in inner]
