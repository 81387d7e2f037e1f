"""What a block computes between its products, with fewer passes over memory and less kept for the backward pass.

Shapes: D model width; … any sizes before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.kernels.recompute import CheapResults

_GATED = ("gate_proj", "up_proj", "down_proj")


def fuse_elementwise(model: nn.Module, results: CheapResults, torch_norms: bool) -> None:
    """Let the norms and gated feed-forward layers of `model` compute as below, where that is what they compute.

    Whether it is, a copy of the layer with a few random weights shows. `torch_norms`: norms are torch's own.
    """
    # Bound methods survive a copy of the model, and compiled code can be shared by layers.
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if isinstance(eps, float) and [*module._parameters] == ["weight"] and _is_rms_norm(module, eps):
            module.forward = _Norm(module, eps, results, torch_norms).forward
        elif all(hasattr(module, name) for name in _GATED) and _is_silu_gated(module):
            module.forward = _GatedLayer(module, results).forward


@dataclass
class _Norm:
    """weight · hidden / √(mean(hidden²) + eps)"""

    norm: Any
    eps: float
    results: CheapResults
    is_torch_s: bool

    def forward(self, hidden: Tensor) -> Tensor:
        weight_D, eps = self.norm.weight, self.eps
        if self.is_torch_s:
            return self.results.compute(
                lambda hidden, weight_D: F.rms_norm(hidden, weight_D.shape, weight_D, eps),
                hidden,
                weight_D.to(hidden.dtype),
            )
        if weight_D.requires_grad:
            normed: Tensor = type(self.norm).forward(self.norm, hidden)
            return normed
        return self.results.compute(
            lambda hidden, weight_D: _FrozenRmsNorm.apply(hidden, weight_D, eps), hidden, weight_D
        )


@dataclass
class _GatedLayer:
    """down_proj(silu(gate_proj(hidden)) · up_proj(hidden))"""

    layer: Any
    results: CheapResults

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.layer.gate_proj(hidden), self.layer.up_proj(hidden)
        output: Tensor = self.layer.down_proj(self.results.compute(_SiluProduct.apply, gate, up))
        return output


class _FrozenRmsNorm(torch.autograd.Function):
    """weight · hidden / √(mean(hidden²) + eps), the mean in float32; `weight` isn't trained."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = hidden.to(torch.float32, copy=True)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight_D, scale)
        return weight_D * wide.mul_(scale).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        hidden, weight_D, scale = ctx.saved_tensors
        normed = hidden.float() * scale
        of_normed = (gradient * weight_D).to(torch.float32, copy=True)
        along = torch.linalg.vecdot(normed, of_normed).div_(hidden.shape[-1]).unsqueeze(-1)
        of_hidden = of_normed.addcmul_(normed, along, value=-1).mul_(scale)
        return of_hidden.to(hidden.dtype), None, None


class _SiluProduct(torch.autograd.Function):
    """silu(gate) · up, of which nothing but `gate` and `up` is kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, F.silu(gate).mul_(gradient)


def _is_rms_norm(module: nn.Module, eps: float) -> bool:
    weight_D = _random(8)
    hidden = _random(3, 8) * eps**0.5  # as large as `eps`, or that wouldn't count
    expected = weight_D * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    return _gives(module, {"_parameters": {"weight": weight_D}}, hidden, expected)


def _is_silu_gated(module: nn.Module) -> bool:
    weights = dict(zip(_GATED, (_random(12, 8), _random(12, 8), _random(8, 12)), strict=True))
    layers = {name: _make_linear(weight) for name, weight in weights.items()}
    hidden = _random(1, 3, 8)
    gated = F.silu(hidden @ weights["gate_proj"].T) * (hidden @ weights["up_proj"].T)
    return _gives(module, {"_modules": {**module._modules, **layers}}, hidden, gated @ weights["down_proj"].T)


def _gives(module: Any, changes: dict[str, Any], hidden: Tensor, expected: Tensor) -> bool:
    """Return whether `module`, with these of its attributes changed, turns `hidden` into `expected`."""
    changed = object.__new__(type(module))
    changed.__dict__ = {**module.__dict__, **changes}
    try:
        found = type(module).forward(changed, hidden)
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    except Exception:  # whatever it needs beside `hidden`, it isn't the layer that is looked for
        return False


def _make_linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
