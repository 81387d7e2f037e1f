"""A linear layer and its LoRA adapter as one product, of which the frozen weight costs nothing but its product.

Shapes: N positions, D inputs, O outputs, R rank.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.lora import find_plain_adapter


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


def _forward(layer: Any, inputs: Tensor) -> Tensor:
    """`forward` of an adapted layer."""
    (name,) = layer.lora_A
    dropout = layer.lora_dropout[name]
    share = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
    kept = torch.empty_like(inputs, dtype=torch.bool).bernoulli_(1 - share) if share else None
    outputs: Tensor = _LoraLinear.apply(
        inputs,
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
        inner_NR = _drop(inputs_ND, kept) @ a.T
        # What dropout divides by is divided by here, where it costs nothing.
        scaling /= 1 - share
        outputs_NO.addmm_(inner_NR, b.T, alpha=scaling)
        ctx.save_for_backward(inputs, weight_OD, a, b, inner_NR, kept)
        ctx.scaling, ctx.dtype = scaling, a_RD.dtype
        return outputs_NO.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight_OD, a, b, inner_NR, kept = ctx.saved_tensors
        gradient_NO = gradient.flatten(0, -2)
        gradient_NR = (gradient_NO @ b).mul_(ctx.scaling)
        gradient_a = gradient_NR.T @ _drop(inputs.flatten(0, -2), kept)
        gradient_b = (gradient_NO.T @ inner_NR).mul_(ctx.scaling)
        gradient_inputs = None
        if ctx.needs_input_grad[0]:
            gradient_ND = gradient_NO @ weight_OD
            if kept is None:
                gradient_ND.addmm_(gradient_NR, a)
            else:
                gradient_ND.addcmul_(gradient_NR @ a, kept.view_as(gradient_ND))
            gradient_inputs = gradient_ND.view_as(inputs)
        return (
            gradient_inputs,
            None,
            None,
            gradient_a.to(ctx.dtype),
            gradient_b.to(ctx.dtype),
            None,
            None,
            None,
        )


def _drop(values_ND: Tensor, kept: Tensor | None) -> Tensor:
    return values_ND if kept is None else values_ND * kept.view_as(values_ND)
