"""A linear layer and its LoRA adapter as one product, of which the frozen weight costs nothing but its product.

Shapes: N positions, D inputs, O outputs, R rank; E a mask's bytes, one for 8 elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.compat import reshape_own
from tunesmith.model.adapters.lora import find_plain_adapter, find_token_rows
from tunesmith.model.frozen_weights import FrozenWeight, weight_of
from tunesmith.model.kernels.recompute import CheapResults, Recipe

# As wide as the numbers whose bits they multiply.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fuse_adapters(model: nn.Module, results: CheapResults, packs_masks: bool) -> None:
    """Let every adapted linear layer of `model` compute with its adapter at once, in the dtype of its input.

    `packs_masks`: which inputs dropout keeps is kept as bits, else as bools.
    """
    for module in model.modules():
        adapter = find_plain_adapter(module)
        if adapter is not None:
            # Bound methods survive a copy of the model, and compiled code can be shared by layers.
            module.forward = _AdaptedLinear(module, adapter, results, packs_masks).forward


def trains_plain_adapters_alone(model: nn.Module) -> bool:
    """Return whether all that is trained lies in layers that `fuse_adapters` fuses, or is rows for tokens.

    Both are cast to the dtype of the products where they are used.
    """
    fused = {
        id(parameter)
        for module in model.modules()
        if find_plain_adapter(module) is not None
        for parameter in module.parameters()
    }
    fused |= {
        id(tokens.rows) for module in model.modules() if (tokens := find_token_rows(module)) is not None
    }
    return all(id(parameter) in fused for parameter in model.parameters() if parameter.requires_grad)


@dataclass
class _AdaptedLinear:
    """A layer of PEFT's that is computed at once with the adapter called `adapter`, where that alone is active."""

    layer: Any
    adapter: str
    results: CheapResults
    packs_masks: bool

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer, name = self.layer, self.adapter
        if args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != [name]:
            output: Tensor = type(layer).forward(layer, inputs, *args, **kwargs)
            return output
        dropout = layer.lora_dropout[name]
        share = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
        kept = _draw_kept(inputs, share, self.packs_masks) if share else None
        recipe, sources = self.results.find(inputs)
        outputs: Tensor = _LoraLinear.apply(
            inputs,
            recipe,
            sources,
            weight_of(layer.base_layer),
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
        recipe: Recipe | None,
        sources: list[Tensor],
        weight: FrozenWeight,
        bias_O: Tensor | None,
        a_RD: Tensor,
        b_OR: Tensor,
        scaling: float,
        kept: Tensor | None,
        share: float,
    ) -> Tensor:
        inputs_ND = inputs.flatten(0, -2)
        a, b = a_RD.to(inputs.dtype), b_OR.to(inputs.dtype)
        outputs_NO = weight.linear(inputs_ND, bias_O)
        # Positions last: products along them are faster on CPUs.
        inner_RN = a @ _drop(inputs_ND, kept).T
        # What dropout divides by is divided by here, where it costs nothing.
        scaling /= 1 - share
        outputs_NO.addmm_(inner_RN.T, b.T, alpha=scaling)
        stored = [*weight]
        ctx.save_for_backward(a, b, inner_RN, kept, *stored, *sources)
        ctx.kind, ctx.num_stored, ctx.recipe, ctx.scaling, ctx.dtype = (
            type(weight),
            len(stored),
            recipe,
            scaling,
            a_RD.dtype,
        )
        # No view: models add to what their layers return.
        return reshape_own(outputs_NO, (*inputs.shape[:-1], len(b)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b, inner_RN, kept, *tensors = ctx.saved_tensors
        weight, sources = ctx.kind(*tensors[: ctx.num_stored]), tensors[ctx.num_stored :]
        inputs = ctx.recipe.compute(*sources) if ctx.recipe else sources[0]
        gradient_NO = gradient.flatten(0, -2)
        gradient_RN = (b.T @ gradient_NO.T).mul_(ctx.scaling)
        gradient_a = gradient_RN @ _drop(inputs.flatten(0, -2), kept)
        gradient_b = (inner_RN @ gradient_NO).mul_(ctx.scaling).T
        gradient_inputs = None
        if ctx.needs_input_grad[0]:
            gradient_ND = weight.input_gradient(gradient_NO)
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


def _draw_kept(values: Tensor, share: float, packs: bool) -> Tensor:
    """Return which of `values` a dropout of this share keeps: bool, in the values' shape.

    With `packs`, for CPUs, which draw numbers slowly, their bits, (E,) int8: each number drawn is for four of them,
    and the share is rounded to a multiple of 2⁻¹⁶.
    """
    if not packs or torch.compiler.is_compiling():
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
