"""A linear layer and its LoRA adapter as one product, of which the frozen weight costs nothing but its product.

Shapes: N positions, D inputs, O outputs, R rank; E a mask's bytes, one for 8 elements.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.adapters import find_plain_adapter

# Devices on which cheap results are computed again rather than kept. On a GPU, whose products leave less time for
# anything else, that is not measured.
FORGETFUL_DEVICES = {"cpu"}

# As wide as the numbers whose bits they multiply.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fuse_adapters(model: nn.Module) -> bool:
    """Let every adapted linear layer of `model` compute with its adapter at once, in the dtype of its input.

    Returns whether all that is trained lies in such layers; the rest computes as before.
    """
    fused: set[int] = set()
    for module in model.modules():
        adapter = find_plain_adapter(module)
        if adapter is not None:
            # A method: it survives a copy of the model, and compiled code can be shared by layers.
            module.forward = MethodType(_forward, module)
            fused |= {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    return all(id(parameter) in fused for parameter in model.parameters() if parameter.requires_grad)


def compute_again(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return `function(*tensors)`, of which the adapted layers that take it keep nothing but `tensors` on CPUs.

    For what is cheaper to compute twice than to keep: the backward pass computes it again, once for all its layers.
    """
    result: Any = function(*tensors)
    if _is_forgetful(result) and torch.is_grad_enabled():
        result.recipe = _Recipe(function), [tensor.detach() for tensor in tensors], result._version
    return result  # type: ignore[no-any-return]


def _is_forgetful(tensor: Tensor) -> bool:
    # A compiler decides for itself what is kept.
    return tensor.device.type in FORGETFUL_DEVICES and not torch.compiler.is_compiling()


def _recipe_of(tensor: Any) -> tuple[_Recipe | None, list[Tensor]]:
    """Return how `tensor` is computed again, and what from; None if it is to be kept."""
    if not torch.compiler.is_compiling() and hasattr(tensor, "recipe"):
        recipe, ingredients, version = tensor.recipe
        # Else it was changed in place.
        if tensor._version == version:
            recipe.num_waiting += 1
            return recipe, ingredients
    return None, [tensor]


class _Recipe:
    """Computes again what several layers take."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.num_waiting = 0
        self._function = function
        self._result: Tensor | None = None

    def compute(self, *tensors: Tensor) -> Tensor:
        result = self._function(*tensors) if self._result is None else self._result
        self.num_waiting -= 1
        self._result = result if self.num_waiting > 0 else None
        return result


def _forward(layer: Any, inputs: Tensor) -> Tensor:
    """`forward` of an adapted layer."""
    (name,) = layer.lora_A
    dropout = layer.lora_dropout[name]
    share = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
    kept = _draw_kept(inputs, share) if share else None
    recipe, ingredients = _recipe_of(inputs)
    outputs: Tensor = _LoraLinear.apply(
        inputs,
        recipe,
        ingredients,
        layer.base_layer.weight,
        layer.base_layer.bias,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.scaling[name],
        kept,
        share,
    )
    return outputs


class _LoraLinear(torch.autograd.Function):
    """inputs @ weight.T + bias + scaling · dropout(inputs) @ a.T @ b.T, in the dtype of the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        recipe: _Recipe | None,
        ingredients: list[Tensor],
        weight_OD: Tensor,
        bias_O: Tensor | None,
        a_RD: Tensor,
        b_OR: Tensor,
        scaling: float,
        kept: Tensor | None,
        share: float,
    ) -> Tensor:
        inputs_ND = inputs.flatten(0, -2)
        a, b = a_RD.to(inputs.dtype), b_OR.to(inputs.dtype)
        outputs_NO = F.linear(inputs_ND, weight_OD, bias_O)
        # Positions last: products along them are faster on CPUs.
        inner_RN = a @ _drop(inputs_ND, kept).T
        # What dropout divides by is divided by here, where it costs nothing.
        scaling /= 1 - share
        outputs_NO.addmm_(inner_RN.T, b.T, alpha=scaling)
        ctx.save_for_backward(weight_OD, a, b, inner_RN, kept, *ingredients)
        ctx.recipe, ctx.scaling, ctx.dtype = recipe, scaling, a_RD.dtype
        return outputs_NO.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight_OD, a, b, inner_RN, kept, *ingredients = ctx.saved_tensors
        inputs = ctx.recipe.compute(*ingredients) if ctx.recipe else ingredients[0]
        gradient_NO = gradient.flatten(0, -2)
        gradient_RN = (b.T @ gradient_NO.T).mul_(ctx.scaling)
        gradient_a = gradient_RN @ _drop(inputs.flatten(0, -2), kept)
        gradient_b = (inner_RN @ gradient_NO).mul_(ctx.scaling).T
        gradient_inputs = None
        if ctx.needs_input_grad[0]:
            gradient_ND = gradient_NO @ weight_OD
            if kept is None:
                gradient_ND.addmm_(gradient_RN.T, a)
            else:
                _add_dropped(gradient_ND, gradient_RN.T @ a, kept)
            gradient_inputs = gradient_ND.view_as(inputs)
        return (
            gradient_inputs,
            None,
            None,
            None,
            None,
            gradient_a.to(ctx.dtype),
            gradient_b.to(ctx.dtype),
            None,
            None,
            None,
        )


def _draw_kept(values: Tensor, share: float) -> Tensor:
    """Return which of `values` a dropout of this share keeps.

    On GPUs bool, in the values' shape. On CPUs, which draw numbers slowly, their bits, (E,) int8: each number drawn
    is for four of them, and the share is rounded to a multiple of 2⁻¹⁶.
    """
    if not _is_forgetful(values):
        return torch.empty_like(values, dtype=torch.bool).bernoulli_(1 - share)
    num_bytes = -(-values.numel() // 8)
    words = torch.empty(2 * num_bytes, dtype=torch.int64, device=values.device).random_(-(2**63), None)
    drawn_8E = words.view(torch.int16).view(8, num_bytes)
    kept_8E = torch.empty_like(drawn_8E, dtype=torch.int8)
    torch.ge(drawn_8E, round(share * 2**16) - 2**15, out=kept_8E)
    return (kept_8E << _bits(values)).sum(0, dtype=torch.int8)


def _drop(values: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return values
    if kept.dtype is torch.bool:
        return values * kept.view_as(values)
    kept_8E = (kept >> _bits(values)).bitwise_and_(1)
    kept_ND = kept_8E.flatten()[: values.numel()].view_as(values)
    # Integers of mixed widths multiply much faster than a number and a bool.
    return (values.view(_INTEGERS[values.itemsize]) * kept_ND).view(values.dtype)


def _add_dropped(total: Tensor, values: Tensor, kept: Tensor) -> None:
    if kept.dtype is torch.bool:
        total.addcmul_(values, kept.view_as(values))
    else:
        total += _drop(values, kept)


def _bits(values: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.int8, device=values.device).unsqueeze(1)
