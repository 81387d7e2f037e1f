"""The work that LoRA training must do, counted from shapes: what a share of the hardware's limit is taken of.

A frozen weight of a block's linear layers costs 4 FLOP a token (2 forward, 2 for the gradient of its input), a
trained one 6. The head costs as much for each *trained* token alone. Attention over an example of n tokens
costs 4·n²·W/2 forward in each layer (W: query heads × head size; half of n² is masked) and twice that backward.
What is recomputed (checkpoints, attention scores), padded, or masked counts as no work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MATRIX_SIZE = 2048


@dataclass(frozen=True)
class Shape:
    """The weights that a token meets, by what it costs there.

    frozen, adapters, head: numbers of weights; without adapters, those of the layers that are trained themselves.
    attention_width: query heads × head size.
    """

    frozen: int
    adapters: int
    head: int
    num_layers: int
    attention_width: int
    trains_head: bool = False


def measure_shape(model: Any) -> Shape:
    """Return the shape of a dense model, sharded or not, with adapters or trained in full."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    embeddings = model.get_input_embeddings().weight
    frozen = adapters = 0
    for parameter in model.parameters():
        if parameter.dim() < 2 or parameter is head or parameter is embeddings:
            continue
        if parameter.requires_grad:
            adapters += parameter.numel()
        else:
            frozen += parameter.numel()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_size
    return Shape(frozen, adapters, head.numel(), config.num_hidden_layers, width, head.requires_grad)


def count_flops(shape: Shape, lengths: Iterable[int], num_trained: int) -> float:
    """Return the FLOP of one step over examples of these lengths, in tokens, of which `num_trained` are trained."""
    lengths = list(lengths)
    head = num_trained * (6 if shape.trains_head else 4) * shape.head
    linear = sum(lengths) * (4 * shape.frozen + 6 * shape.adapters) + head
    forward = sum(4 * length**2 * shape.attention_width / 2 for length in lengths)
    return linear + 3 * shape.num_layers * forward


def count_product_flops(size: int = MATRIX_SIZE) -> float:
    """Return the FLOP of one product of two square matrices."""
    return 2 * size**3
