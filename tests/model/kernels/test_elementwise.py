"""Norms and gated layers that keep less compute what transformers' own do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from support.tiny_models import FAMILIES, build_config
from tunesmith.model.kernels.elementwise import _FrozenRmsNorm, _SiluProduct
from tunesmith.model.kernels.install import CPU, install_kernels


def build(family: str) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(build_config(family, 50))
    for parameter in model.parameters():
        # Norms begin with ones, which would hide a weight that is left out.
        nn.init.normal_(parameter, 0.3, 0.3)
        parameter.requires_grad_(False)
    return model


def replaced(model: nn.Module) -> set[str]:
    """Return the classes of the layers whose forward isn't their own."""
    return {type(module).__name__ for module in model.modules() if "forward" in module.__dict__}


def outputs_and_gradient(model: Any, embedded: Tensor) -> tuple[Tensor, Tensor]:
    embedded = embedded.clone().requires_grad_()
    logits: Tensor = model(inputs_embeds=embedded).logits
    logits.square().mean().backward()
    assert embedded.grad is not None
    return logits, embedded.grad


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_stay(family: str) -> None:
    theirs = build(family)
    ours = copy.deepcopy(theirs)
    install_kernels(ours, CPU)
    embedded = torch.randn(2, 9, theirs.config.hidden_size, generator=torch.Generator().manual_seed(1)) / 100
    for mine, its in zip(
        outputs_and_gradient(ours, embedded), outputs_and_gradient(theirs, embedded), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=3e-5)


def test_llamas_layers_are_found_and_those_that_compute_otherwise_are_left() -> None:
    found = {}
    for family in ("llama", "mixtral", "phi3", "gemma"):
        model = build(family)
        install_kernels(model, CPU)
        found[family] = replaced(model)
    assert found == {
        "llama": {"LlamaRMSNorm", "LlamaMLP"},
        "mixtral": {"MixtralRMSNorm"},
        "phi3": {"Phi3RMSNorm"},
        "gemma": set(),
    }


def test_norms_that_are_trained_get_their_gradient() -> None:
    model = build("llama").requires_grad_(True)
    expected = copy.deepcopy(model)
    install_kernels(model, CPU)
    for each in (model, expected):
        each(torch.arange(6).unsqueeze(0)).logits.square().mean().backward()
    for mine, its in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-6)


def test_the_products_and_norms_have_the_gradients_that_differences_show() -> None:
    gate, up = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).unbind()
    assert torch.autograd.gradcheck(_SiluProduct.apply, (gate.requires_grad_(), up.requires_grad_()))
    hidden, weight = torch.randn(4, 8), torch.randn(8)
    # The mean is one of float32.
    differences = {"eps": 1e-2, "atol": 2e-2}
    norm = lambda values: _FrozenRmsNorm.apply(values, weight, 1e-5)  # noqa: E731
    assert torch.autograd.gradcheck(norm, hidden.requires_grad_(), **differences)


def test_nothing_but_inputs_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []
    hidden, gate, up = (torch.randn(6, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved.nbytes) or saved, lambda x: x
    ):
        _FrozenRmsNorm.apply(hidden, torch.ones(32, dtype=torch.bfloat16), 1e-5)
        _SiluProduct.apply(gate, up)
    assert sum(kept) == 3 * hidden.nbytes + 2 * 32 + 6 * 4
