"""A linear layer computed at once with its adapter is what PEFT computes in steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tunesmith.model.kernels.install import CPU, install_kernels
from tunesmith.model.kernels.lora_linear import fuse_adapters, trains_plain_adapters_alone
from tunesmith.model.kernels.recompute import CheapResults


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 6, bias=False)
        self.third = nn.Linear(12, 20)
        self.table = nn.Embedding(5, 12)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(values)))


def adapted(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"], **settings})
    model = get_peft_model(Net(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)  # a fresh adapter's B is zero
    return model


def outputs_and_gradients(model: nn.Module, values: torch.Tensor) -> list[torch.Tensor]:
    values = values.clone().requires_grad_()
    torch.manual_seed(1)
    output = model(values)
    output.square().sum().backward()
    assert values.grad is not None
    return [output, values.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_outputs_and_gradients_are_those_of_peft(shape: tuple[int, ...], use_rslora: bool) -> None:
    theirs = adapted(use_rslora=use_rslora)
    ours = copy.deepcopy(theirs)
    install_kernels(ours.double(), CPU)
    assert trains_plain_adapters_alone(ours)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()
    found, expected = outputs_and_gradients(ours, values), outputs_and_gradients(theirs.double(), values)
    assert len(found) == len(expected) == 6
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_inputs_without_rows_give_gradients_of_zero(dropout: float) -> None:
    # An output layer has some where a rank has no trained token.
    model = adapted(lora_dropout=dropout)
    install_kernels(model, CPU)
    outputs, of_inputs, *of_weights = outputs_and_gradients(model, torch.empty(1, 0, 12))
    assert (outputs.shape, of_inputs.shape) == ((1, 0, 6), (1, 0, 12))
    assert len(of_weights) == 4
    assert all(bool((gradient == 0).all()) for gradient in of_weights)


def test_frozen_weights_get_no_gradient() -> None:
    model = adapted()
    install_kernels(model, CPU)
    outputs_and_gradients(model, torch.randn(4, 12))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)


def test_dropout_falls_on_the_adapter_alone_and_keeps_its_mean() -> None:
    model = adapted(lora_dropout=0.25)
    install_kernels(model, CPU)
    layer = model.get_submodule("base_model.model.first")
    values = torch.ones(1, 12)
    without = layer.eval()(values)
    torch.manual_seed(0)
    layer.train()
    drawn = torch.stack([layer(values) for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(0), without, rtol=0.1, atol=0.15)
    base = layer.base_layer(values)
    assert (drawn - base).std(0).min() > 0
    assert torch.equal(layer.eval()(values), without)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.004, 0.1, 0.5, 0.95])
def test_dropout_drops_its_share_of_any_input_and_leaves_the_others(share: float, dtype: torch.dtype) -> None:
    config = LoraConfig(r=50, lora_alpha=50, target_modules=["0"], lora_dropout=share)
    model = get_peft_model(nn.Sequential(nn.Linear(50, 50, bias=False)), config)
    layer = model.get_submodule("base_model.model.0")
    nn.init.zeros_(layer.base_layer.weight)
    nn.init.eye_(layer.lora_A["default"].weight)
    nn.init.eye_(layer.lora_B["default"].weight)
    install_kernels(model.to(dtype), CPU)
    torch.manual_seed(0)
    values = 1 + torch.rand(1001, 50).to(dtype)
    outputs, others = layer(values), layer(values)
    dropped = outputs == 0
    torch.testing.assert_close(outputs, (values / (1 - share)).masked_fill(dropped, 0))

    def assert_near(found: torch.Tensor, expected: float, num_drawn: int) -> None:
        """No share is further off than one in a million would be."""
        error = (expected * (1 - expected) / num_drawn) ** 0.5
        assert (found - expected).abs().max() < 5 * error + 2 / num_drawn

    assert_near(dropped.double().mean(), share, dropped.numel())
    assert_near(dropped.double().mean(0), share, 1001)
    assert_near((dropped & (others == 0)).double().mean(), share**2, dropped.numel())
    assert_near((dropped[:, 1:] & dropped[:, :-1]).double().mean(), share**2, dropped.numel())


def test_dropout_is_the_same_in_the_backward_pass() -> None:
    model = adapted(lora_dropout=0.5).double()
    install_kernels(model, CPU)

    def drawn(values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return model(values)

    values = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(drawn, values)


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_what_is_computed_again_is_so_once_for_all_layers_and_not_kept(dropout: float) -> None:
    model = adapted(target_modules=["first", "second", "third"], lora_dropout=dropout).double()
    results = CheapResults(are_kept=False)
    fuse_adapters(model, results, packs_masks=True)
    net = model.get_submodule("base_model.model")
    values = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    num_calls = 0
    kept: set[int] = set()

    def square(values: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return values.square()

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept.add(saved.untyped_storage().data_ptr())
        return saved

    def differentiate(again: bool) -> tuple[int, list[torch.Tensor]]:
        kept.clear()
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            squares = results.compute(square, values) if again else square(values)
            output = (net.first(squares) @ net.third(squares).T).sum()
            is_kept = squares.untyped_storage().data_ptr() in kept
        del squares
        return is_kept, torch.autograd.grad(output, [values, *trained])

    trained = [p for layer in (net.first, net.third) for p in layer.parameters() if p.requires_grad]
    was_kept, expected = differentiate(again=False)
    num_calls = 0
    is_kept, found = differentiate(again=True)
    assert (was_kept, is_kept, num_calls) == (True, False, 2)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its)


def test_what_was_changed_in_place_is_kept() -> None:
    model = adapted()
    results = CheapResults(are_kept=False)
    fuse_adapters(model, results, packs_masks=True)
    net = model.get_submodule("base_model.model")
    values = torch.randn(5, 12)
    gradients = []
    for squares in (values.square().add(1), results.compute(torch.square, values).add_(1)):
        gradients.append(torch.autograd.grad(net.first(squares).sum(), net.first.lora_A["default"].weight))
    torch.testing.assert_close(*gradients)


def test_products_are_in_the_dtype_of_the_input_and_gradients_in_that_of_the_adapter() -> None:
    model = adapted()
    install_kernels(model, CPU)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    output = model(torch.randn(4, 12, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"target_modules": ["first", "table"]}, {"modules_to_save": ["second"], "target_modules": ["first"]}, {"lora_bias": True}],
    ids=str,
)  # fmt: skip
def test_anything_else_that_is_trained_is_told(settings: dict[str, Any]) -> None:
    assert not trains_plain_adapters_alone(adapted(**settings))


def with_two_adapters() -> nn.Module:
    """Return a model with a second adapter, of which the first is active."""
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    for name, parameter in model.named_parameters():
        if ".other." in name:
            nn.init.normal_(parameter)
    return model


STATES: dict[str, Callable[[Any], Any]] = {
    "none is active": lambda model: model.disable_adapter(),
    "another is active": lambda model: nullcontext(model.set_adapter("other")),
    "both are active": lambda model: nullcontext(model.base_model.set_adapter(["default", "other"])),
    "one is merged": lambda model: nullcontext(model.merge_adapter(["default"])),
    "another one is merged": lambda model: nullcontext(model.merge_adapter(["other"])),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("is_fused_first", [True, False])
def test_the_adapters_that_peft_has_active_are_those_that_compute(state: str, is_fused_first: bool) -> None:
    theirs = with_two_adapters()
    ours = copy.deepcopy(theirs)
    if is_fused_first:  # while it has one adapter
        ours.delete_adapter("other")
        install_kernels(ours, CPU)
        ours.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
        ours.load_state_dict(theirs.state_dict())
    else:
        install_kernels(ours, CPU)
    values = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    plain = ours(values)
    torch.testing.assert_close(plain, theirs(values))
    with STATES[state](ours), STATES[state](theirs):
        inside = ours(values)
        torch.testing.assert_close(inside, theirs(values))
    assert torch.allclose(inside, plain, atol=1e-5) == (state == "one is merged")


def test_a_pass_without_adapters_leaves_the_one_after_it_as_it_was() -> None:
    model = adapted()
    install_kernels(model, CPU)
    values = torch.randn(4, 12)
    before = outputs_and_gradients(model, values)
    with model.disable_adapter(), torch.no_grad():
        assert not torch.equal(model(values), before[0])
    model.zero_grad()
    for mine, its in zip(outputs_and_gradients(model, values), before, strict=True):
        assert torch.equal(mine, its)


def test_a_copy_of_a_model_computes_with_its_own_weights() -> None:
    model = adapted()
    install_kernels(model, CPU)
    other = copy.deepcopy(model)
    values = torch.randn(4, 12)
    before = model(values)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(values), before)
    assert torch.equal(other(values), torch.zeros_like(before))
