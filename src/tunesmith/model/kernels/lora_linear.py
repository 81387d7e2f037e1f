"""A linear layer and its LoRA adapter as one product, of which the frozen weight costs nothing but its product.

Shapes: N positions, D inputs, O outputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.compat import reshape_own
from tunesmith.model.adapters.lora import find_plain_adapter, find_token_rows
from tunesmith.model.frozen_weights import FrozenWeight, weight_of
from tunesmith.model.kernels.dropout import Dropout, add_dropped, drop, find_dropout, make_layer_key
from tunesmith.model.kernels.recompute import CheapResults, Recipe


def fuse_adapters(model: nn.Module, results: CheapResults, packs_masks: bool) -> None:
    """Let every adapted linear layer of `model` compute with its adapter at once, in the dtype of its input.

    What their dropout drops follows from their number among them. `packs_masks`: masks that don't are kept as bits,
    else as bools.
    """
    adapters = ((module, find_plain_adapter(module)) for module in model.modules())
    adapted = ((module, adapter) for module, adapter in adapters if adapter is not None)
    for i, (module, adapter) in enumerate(adapted):
        # Bound methods survive a copy of the model, and compiled code can be shared by layers.
        module.forward = _AdaptedLinear(module, adapter, make_layer_key(i), results, packs_masks).forward


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
    key: Tensor
    results: CheapResults
    packs_masks: bool

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer, name = self.layer, self.adapter
        if args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != [name]:
            output: Tensor = type(layer).forward(layer, inputs, *args, **kwargs)
            return output
        module = layer.lora_dropout[name]
        share = module.p if layer.training and isinstance(module, nn.Dropout) else 0.0
        dropout = find_dropout(inputs, share, self.key, self.packs_masks) if share else None
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
            dropout,
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
        dropout: Dropout | None,
        share: float,
    ) -> Tensor:
        inputs_ND = inputs.flatten(0, -2)
        a, b = a_RD.to(inputs.dtype), b_OR.to(inputs.dtype)
        outputs_NO = weight.linear(inputs_ND, bias_O)
        # Positions last: products along them are faster on CPUs.
        inner_RN = a @ drop(inputs_ND, dropout.draw(inputs_ND, share) if dropout else None).T
        # What dropout divides by is divided by here, where it costs nothing.
        scaling /= 1 - share
        outputs_NO.addmm_(inner_RN.T, b.T, alpha=scaling)
        stored, drawn = [*weight], [*(dropout or ())]
        ctx.save_for_backward(a, b, inner_RN, *stored, *drawn, *sources)
        ctx.kind, ctx.num_stored, ctx.recipe, ctx.scaling, ctx.dtype = (
            type(weight),
            len(stored),
            recipe,
            scaling,
            a_RD.dtype,
        )
        ctx.dropout, ctx.num_drawn, ctx.share = type(dropout), len(drawn), share
        # No view: models add to what their layers return.
        return reshape_own(outputs_NO, (*inputs.shape[:-1], len(b)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b, inner_RN, *tensors = ctx.saved_tensors
        weight, tensors = ctx.kind(*tensors[: ctx.num_stored]), tensors[ctx.num_stored :]
        drawn, sources = tensors[: ctx.num_drawn], tensors[ctx.num_drawn :]
        inputs = ctx.recipe.compute(*sources) if ctx.recipe else sources[0]
        inputs_ND = inputs.flatten(0, -2)
        kept = ctx.dropout(*drawn).draw(inputs_ND, ctx.share) if drawn else None
        gradient_NO = gradient.flatten(0, -2)
        gradient_RN = (b.T @ gradient_NO.T).mul_(ctx.scaling)
        gradient_a = gradient_RN @ drop(inputs_ND, kept)
        gradient_b = (inner_RN @ gradient_NO).mul_(ctx.scaling).T
        gradient_inputs = None
        if ctx.needs_input_grad[0]:
            gradient_ND = weight.input_gradient(gradient_NO)
            if kept is None:
                gradient_ND.addmm_(gradient_RN.T, a)
            else:
                add_dropped(gradient_ND, gradient_RN.T @ a, kept)
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
