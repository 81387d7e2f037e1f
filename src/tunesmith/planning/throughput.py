"""Floating-point operations of training."""

from __future__ import annotations

from torch import nn

from tunesmith.model.frozen_weights import FrozenLinear
from tunesmith.model.head import find_head


def count_flops_per_token(model: nn.Module, full_ft: bool) -> float:
    """Return the FLOP that training must spend on one token: without recomputation, attention scores, dropout.

    Each weight of a product costs 2 forward and 2 for the gradient of its input; a trained weight costs 2
    more. Experts count as often as the router uses them. Counts whole weights, sharded or not.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    active_share = (getattr(config, "num_experts_per_tok", None) or num_experts) / num_experts
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = find_head(model).layer
    stored = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    flops = sum(4.0 * layer.in_features * layer.out_features for layer in stored)
    for parameter in model.parameters():
        if (
            parameter.dim() < 2
            or not parameter.is_floating_point()
            or (id(parameter) in embeddings and parameter is not head.weight)
        ):
            continue
        share = active_share if parameter.dim() == 3 else 1.0
        flops += share * parameter.numel() * (6 if full_ft or parameter.requires_grad else 4)
    return flops
