"""How the frozen weights of linear layers are stored, and what is multiplied by them.

Shapes: N positions, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.parallel.blocks import find_blocks

# Names of the layers that choose experts: small, and their choice is never to be rounded or adapted.
ROUTERS = ("gate", "router", "shared_expert_gate")

# Of a weight that is packed, so that what packing needs besides stays small.
_NUMBERS_AT_A_TIME = 1 << 22


class FrozenWeight(Protocol):
    """A weight of shape (O, D) as it is stored: a named tuple of tensors, whose dim 0 is the weight's rows.

    Any rows are packed alike, whatever lies beside them: so a slice of what is stored is what its rows are stored as,
    on any number of workers. All but `Dense` store integers; scales too, seen as bytes: numbers with a point would be
    cast to the dtype of the products.
    """

    def __init__(self, *stored: Tensor) -> None:
        """Take the stored tensors."""

    @property
    def _fields(self) -> tuple[str, ...]:
        """What the stored tensors are called: a named tuple's class has it too."""

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the stored tensors."""

    @classmethod
    def pack(cls, rows_OD: Tensor) -> Self:
        """Return how these rows are stored; they may hold no data, on the meta device."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (O, D)."""

    def linear(self, inputs_ND: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Return `inputs @ weight.T + bias`, (N, O), in the dtype of the inputs."""

    def add_linear(self, total_NO: Tensor, inputs_ND: Tensor) -> None:
        """Add `inputs @ weight.T` to a total in the dtype of the inputs."""

    def input_gradient(self, gradient_NO: Tensor) -> Tensor:
        """Return `gradient @ weight`, (N, D), in the dtype of the gradient."""

    def add_input_gradient(self, total_ND: Tensor, gradient_NO: Tensor) -> None:
        """Add `gradient @ weight` to a total in the dtype of the gradient."""


class Dense(NamedTuple):
    """A weight as the model has it."""

    weight_OD: Tensor

    @classmethod
    def pack(cls, rows_OD: Tensor) -> Dense:
        return cls(rows_OD)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight_OD.to(dtype)

    def linear(self, inputs_ND: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return F.linear(inputs_ND, self.weight_OD, bias_O)

    def add_linear(self, total_NO: Tensor, inputs_ND: Tensor) -> None:
        add_product(total_NO, inputs_ND, self.weight_OD.T)

    def input_gradient(self, gradient_NO: Tensor) -> Tensor:
        return gradient_NO @ self.weight_OD

    def add_input_gradient(self, total_ND: Tensor, gradient_NO: Tensor) -> None:
        add_product(total_ND, gradient_NO, self.weight_OD)


class FrozenLinear(nn.Module):
    """A linear layer whose weight is stored otherwise than dense: its stored tensors are parameters."""

    def __init__(self, layer: nn.Linear, kind: type[FrozenWeight]) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        packed = _pack(layer.weight.detach(), kind)
        self.names = packed._fields
        for name, stored in zip(self.names, packed, strict=True):
            assert not stored.is_floating_point(), f"{kind.__name__}.{name} would be cast"
            self.register_parameter(name, nn.Parameter(stored, requires_grad=False))
        self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        outputs_NO: Tensor = _FrozenProduct.apply(inputs.flatten(0, -2), weight_of(self), self.bias)
        return outputs_NO.view(*inputs.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind.__name__}"


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to a total, in place in compiled code too, which copies what it is to add a product to."""
    if torch.compiler.is_compiling():
        _add_product(total, left, right)
    else:
        total.addmm_(left, right)


@torch.library.custom_op("tunesmith::add_product", mutates_args={"total"})
def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.addmm_(left, right)


@_add_product.register_fake
def _(total: Tensor, left: Tensor, right: Tensor) -> None:
    """It makes no tensor."""


def store_weights(model: nn.Module, kind: type[FrozenWeight]) -> None:
    """Store the frozen linear layers in the blocks of `model` as `kind` does; routers, embeddings and head stay.

    On the meta device too: then it tells what would be stored.
    """
    if kind is Dense:
        return
    for block in find_blocks(model):
        for parent in block.modules():
            for name, layer in parent.named_children():
                if type(layer) is nn.Linear and name not in ROUTERS and not _is_trained(layer):
                    setattr(parent, name, FrozenLinear(layer, kind))


def weight_of(layer: Any) -> FrozenWeight:
    """Return what a frozen linear layer multiplies by."""
    if isinstance(layer, FrozenLinear):
        return layer.kind(*(getattr(layer, name) for name in layer.names))
    return Dense(layer.weight)


class _FrozenProduct(torch.autograd.Function):
    """inputs @ weight.T + bias, of which the inputs alone have a gradient."""

    @staticmethod
    def forward(ctx: Any, inputs_ND: Tensor, weight: FrozenWeight, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(*weight)
        ctx.kind = type(weight)
        return weight.linear(inputs_ND, bias_O)

    @staticmethod
    def backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor, None, None]:
        return ctx.kind(*ctx.saved_tensors).input_gradient(gradient_NO), None, None


def _pack(weight_OD: Tensor, kind: type[FrozenWeight]) -> FrozenWeight:
    parts = [kind.pack(rows) for rows in weight_OD.split(max(1, _NUMBERS_AT_A_TIME // weight_OD.shape[1]))]
    return kind(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _is_trained(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())
