"""Adapted layers that share an input are what PEFT computes, layer by layer, for less."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from support.step_costs import IN_PLACE_PRODUCTS, BytesMoved
from tunesmith.model.kernels.install import CPU, GPU, Kernels, install_kernels

WIDTH = 12
ADAPTED = ("q", "k", "v", "o")
GROUP = [["base_model.model.q", "base_model.model.k", "base_model.model.v"]]
BY_DEVICE = {"cpu": CPU, "gpu": GPU}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, 20)
        self.k = nn.Linear(WIDTH, 8, bias=False)
        self.v = nn.Linear(WIDTH, 8)
        self.o = nn.Linear(20, WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        hidden = torch.tanh(values)
        q, k, v = self.q(hidden), self.k(hidden), self.v(hidden)
        return self.o(q.tanh()) + (k * v).sum(-1, keepdim=True)


def adapted(net: nn.Module | None = None, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": [*ADAPTED], **settings})
    model = get_peft_model(net or Net(), config).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)  # a fresh adapter's B is zero
    return model


def grouped(model: nn.Module, kernels: Kernels = CPU) -> Any:
    """Return a copy of the model that computes in groups, if the kernels have them."""
    ours = copy.deepcopy(model)
    install_kernels(ours, kernels, GROUP)
    return ours


def make_values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def differentiate(model: nn.Module, run: Callable[..., Tensor], *values: Tensor) -> dict[str, Tensor | None]:
    """Return what `run` makes of the bare net and the values, and all gradients of its squares."""
    inputs = [value.clone().requires_grad_() for value in values]
    torch.manual_seed(1)
    output = run(model.get_submodule("base_model.model"), *inputs)
    output.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {"output": output.detach(), **found, **{f"input {i}": v.grad for i, v in enumerate(inputs)}}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, its in expected.items():
        assert (found[name] is None) == (its is None), name
        if its is not None:
            torch.testing.assert_close(found[name], its, msg=name)


@pytest.mark.parametrize("device", BY_DEVICE)
@pytest.mark.parametrize("shape", [(7, WIDTH), (2, 3, WIDTH), (1, 0, WIDTH)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"rank_pattern": {"k": 2, "v": 5}, "alpha_pattern": {"q": 1}, "use_rslora": True}],
    ids=["one rank", "several ranks"],
)
def test_outputs_and_gradients_are_those_of_peft(
    settings: dict[str, Any], shape: tuple[int, ...], device: str
) -> None:
    theirs = adapted(**settings)
    values = make_values(*shape)
    expected = differentiate(theirs, Net.forward, values)
    assert len(expected) == 10
    assert_same(differentiate(grouped(theirs, BY_DEVICE[device]), Net.forward, values), expected)


def shared_by_some(net: Any, one: Tensor, other: Tensor) -> Tensor:
    return net.q(one).sum() * net.k(other).sum() + net.v(one).sum()


def called_out_of_order(net: Any, one: Tensor, _: Tensor) -> Tensor:
    return net.v(one).sum() + net.k(one).sum() * net.q(one).sum()


def called_again(net: Any, one: Tensor, other: Tensor) -> Tensor:
    sums = [net.q(values).sum() * net.k(values).sum() + net.v(values).sum() for values in (one, one, other)]
    return torch.stack(sums)


def changed_in_place(net: Any, one: Tensor, _: Tensor) -> Tensor:
    q, k, v = net.q(one), net.k(one), net.v(one)
    q.add_(1)
    k.mul_(v)
    return q.view(-1).add_(2).sum() + k.sum()


def one_left_out(net: Any, one: Tensor, _: Tensor) -> Tensor:
    return net.q(one).sum() + net.v(one).square().sum()


def one_unused(net: Any, one: Tensor, _: Tensor) -> Tensor:
    q, _, v = net.q(one), net.k(one), net.v(one)
    return q.sum() + v.square().sum()


def recomputed(net: Any, one: Tensor, _: Tensor) -> Tensor:
    output: Tensor = checkpoint(net.__class__.forward, net, one, use_reentrant=False)
    return output


@pytest.mark.parametrize(
    "run",
    [
        shared_by_some,
        called_out_of_order,
        called_again,
        changed_in_place,
        one_left_out,
        one_unused,
        recomputed,
    ],
)
def test_a_net_may_call_its_layers_as_it_likes(run: Callable[..., Tensor]) -> None:
    theirs = adapted()
    values = make_values(2, 5, WIDTH)
    assert_same(
        differentiate(grouped(theirs), run, values[0], values[1]),
        differentiate(theirs, run, values[0], values[1]),
    )


def test_an_input_that_was_changed_in_between_is_multiplied_as_it_is_then() -> None:
    theirs = adapted()
    net = grouped(theirs).get_submodule("base_model.model")
    values = make_values(5, WIDTH)
    with torch.no_grad():
        before = net.k(values)
        net.q(values)
        values.add_(1)
        after = net.k(values)
        torch.testing.assert_close(after, theirs.get_submodule("base_model.model").k(values))
    assert not torch.allclose(before, after)


def test_what_was_computed_without_a_graph_is_not_taken_where_there_is_one() -> None:
    net = grouped(adapted()).get_submodule("base_model.model")
    values = make_values(5, WIDTH)
    with torch.no_grad():
        net.q(values)
    assert net.k(values).requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_evaluation_gives_the_same(context: Callable[[], Any]) -> None:
    theirs = adapted(lora_dropout=0.5).eval()
    ours = grouped(theirs)
    with context():
        values = make_values(5, WIDTH)
        torch.testing.assert_close(ours(values), theirs(values))


class WithSpy(Net):
    """Beside the others a layer that shows what dropout has left of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.spy = nn.Linear(WIDTH, WIDTH, bias=False)


@pytest.mark.parametrize("kernels", BY_DEVICE.values(), ids=BY_DEVICE)
def test_a_group_has_one_dropout_in_both_passes(kernels: Kernels) -> None:
    model = adapted(
        WithSpy(),
        target_modules=[*ADAPTED, "spy"],
        rank_pattern={"spy": WIDTH},
        alpha_pattern={"spy": WIDTH},
        lora_dropout=0.25,
    )
    net: Any = model.get_submodule("base_model.model")
    nn.init.zeros_(net.spy.base_layer.weight)
    nn.init.eye_(net.spy.lora_A["default"].weight)
    nn.init.eye_(net.spy.lora_B["default"].weight)
    plain = copy.deepcopy(model).eval()
    install_kernels(model, kernels, [["base_model.model.spy", *GROUP[0]]])
    seen: list[Tensor] = []

    def run(net: Any, values: Tensor) -> Tensor:
        seen.append(net.spy(values).detach())
        return torch.cat([net.q(values), net.k(values), net.v(values)], -1)

    def run_plainly(net: Any, values: Tensor) -> Tensor:
        left = values * (seen[0] != 0) / 0.75
        outputs = []
        for layer in (net.q, net.k, net.v):
            inner = left @ layer.lora_A["default"].weight.T
            of_adapter = inner @ layer.lora_B["default"].weight.T * layer.scaling["default"]
            outputs.append(layer.base_layer(values) + of_adapter)
        return torch.cat(outputs, -1)

    values = make_values(40, WIDTH)
    assert_same(differentiate(model, run, values), differentiate(plain, run_plainly, values))
    assert 0.15 < float((seen[0] == 0).double().mean()) < 0.35


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputing_changes_nothing(dropout: float) -> None:
    model = grouped(adapted(lora_dropout=dropout))
    values = make_values(5, WIDTH)
    assert_same(
        differentiate(model, lambda net, one: recomputed(net, one, one), values),
        differentiate(model, Net.forward, values),
    )


def test_nothing_lives_longer_than_until_the_next_group_runs() -> None:
    net = grouped(adapted()).get_submodule("base_model.model")
    for run in (one_left_out, called_again):
        values = make_values(5, WIDTH)
        held = weakref.ref(values)
        run(net, values, values)
        del values
        if run is one_left_out:
            net.q(make_values(5, WIDTH))
        assert held() is None


@pytest.mark.parametrize("state", ["disabled", "merged", "one of another dropout"])
def test_layers_that_compute_otherwise_do_so(state: str) -> None:
    theirs = adapted()
    ours = grouped(theirs)
    values = make_values(5, WIDTH)
    for model in (ours, theirs):
        if state == "disabled":
            model.disable_adapter_layers()
        elif state == "merged":
            model.get_submodule("base_model.model.k").merge()
        else:
            model.get_submodule("base_model.model.k").lora_dropout["default"] = nn.Dropout(1e-12)
    torch.testing.assert_close(ours(values), theirs(values))


def test_a_copy_of_a_model_computes_with_its_own_weights() -> None:
    model = grouped(adapted())
    values = make_values(4, WIDTH)
    before = model(values)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(values), before)
    assert torch.equal(other(values), torch.zeros_like(before))


class Wide(nn.Module):
    """The shapes of an attention whose heads share keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(1024, width, bias=False) for width in (1024, 256, 256))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([self.q(hidden), self.k(hidden), self.v(hidden)], -1).sum()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_group_moves_and_keeps_fewer_bytes_for_the_same_products(dropout: float) -> None:
    costs = []
    for groups_adapters in (True, False):
        config = LoraConfig(r=16, target_modules=["q", "k", "v"], lora_dropout=dropout)
        with torch.device("meta"):
            model = get_peft_model(Wide(), config).bfloat16()
            hidden = torch.empty(4096, 1024, dtype=torch.bfloat16, requires_grad=True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        install_kernels(model, replace(GPU, groups_adapters=groups_adapters), GROUP)
        known = {p.untyped_storage()._cdata for p in model.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, known: set[int] = known, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        values = hidden.tanh()
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE_PRODUCTS) as flops, BytesMoved() as moved:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = model(values)
            output.backward()
        costs.append((flops.get_total_flops(), moved.total, sum(saved.values())))
    (flops_grouped, moved_grouped, saved_grouped), (flops_alone, moved_alone, saved_alone) = costs
    assert flops_grouped == flops_alone > 0
    # Of the input, whose elements have two bytes: its products with A, and with their gradients, are one instead of
    # three; its gradients aren't added up apart. A mask has one byte an element.
    of_input = 4096 * 1024 * 2
    assert moved_alone - moved_grouped > (8 if dropout else 6) * of_input
    assert saved_alone - saved_grouped == (of_input if dropout else 0)


def test_a_group_stays_in_one_graph_that_blocks_share() -> None:
    torch._dynamo.reset()
    counters.clear()
    theirs = adapted(nn.Sequential(Net(), Net(), Net()))
    ours = copy.deepcopy(theirs)
    install_kernels(
        ours, GPU, [[f"base_model.model.{i}.{name}" for name in ("q", "k", "v")] for i in range(3)]
    )
    net: Any = ours.get_submodule("base_model.model")
    for block in net:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True, dynamic=True)
    values = make_values(5, WIDTH)
    expected = differentiate(theirs, lambda net, one: net(one), values)
    assert_same(differentiate(ours, lambda net, one: net(one), values), expected)
    assert counters["stats"]["unique_graphs"] == 1
