"""Dropout by token: random enough, the same in any batch, in both passes and compiled; and nothing of it is kept."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tunesmith.data.draws import Draws
from tunesmith.model.kernels.dropout import (
    TokenDropout,
    drawing_at,
    drawing_from,
    make_column_keys,
    make_layer_key,
)
from tunesmith.model.kernels.install import CPU, GPU, Kernels, install_kernels

SHARES = (0.004, 0.1, 0.5, 0.95)


def make_keys(num_rows: int, num_tokens: int, step: int = 1) -> Tensor:
    places = np.broadcast_to(np.arange(num_tokens), (num_rows, num_tokens))
    return torch.from_numpy(Draws(0, step).token_keys(np.arange(num_rows)[:, None], places))


def draw(keys_BT: Tensor, num_columns: int, share: float, layer: int = 0) -> Tensor:
    values_ND = torch.empty(keys_BT.numel(), num_columns)
    return TokenDropout(keys_BT, make_column_keys(keys_BT.device), make_layer_key(layer)).draw(
        values_ND, share
    )


def assert_near(found: Tensor, expected: float, num_drawn: int, num_found: int = 1) -> None:
    """No share is further off than one in a million would be."""
    error = (expected * (1 - expected) / num_drawn) ** 0.5
    far = 5 + math.log10(num_found)
    assert (found - expected).abs().max() < far * error + 2 / num_drawn


@pytest.mark.parametrize("share", SHARES)
def test_the_share_that_is_kept_is_the_same_everywhere(share: float) -> None:
    kept_BTD = draw(make_keys(40, 50), 402, share).view(40, 50, 402).double()
    for along in ((0, 1, 2), (0, 1), (1, 2), (0, 2), (0,), (2,)):
        found = kept_BTD.mean(along)
        assert_near(found, 1 - share, kept_BTD.numel() // found.numel(), found.numel())


@pytest.mark.parametrize("share", SHARES)
def test_what_is_dropped_here_says_nothing_of_what_is_dropped_there(share: float) -> None:
    keys_BT = make_keys(30, 60)
    kept_BTD = draw(keys_BT, 400, share).view(30, 60, 400)

    def assert_independent(some: Tensor, others: Tensor) -> None:
        assert_near((some & others).double().mean(), (1 - share) ** 2, some.numel())

    for gap in (1, 2, 3, 4, 8, 64):
        assert_independent(kept_BTD[..., gap:], kept_BTD[..., :-gap])
    assert_independent(kept_BTD[:, 1:], kept_BTD[:, :-1])
    assert_independent(kept_BTD[1:], kept_BTD[:-1])
    assert_independent(kept_BTD[:, 1:, 4:], kept_BTD[:, :-1, :-4])
    for layer in (1, 2, 223, 2**20, 2**20 + 1):
        assert_independent(kept_BTD, draw(keys_BT, 400, share, layer).view(30, 60, 400))
    for step in (2, 3):
        assert_independent(kept_BTD, draw(make_keys(30, 60, step), 400, share).view(30, 60, 400))


def test_no_two_columns_tokens_or_layers_go_together() -> None:
    keys_BT = make_keys(20, 30)
    masks_LND = torch.stack([draw(keys_BT, 500, 0.1, layer) for layer in range(12)]).float()
    scores_LND = (masks_LND - 0.9) / (0.1 * 0.9) ** 0.5
    for along in range(3):
        scores_XY = scores_LND.movedim(along, 0).flatten(1)
        correlations_XX = (scores_XY @ scores_XY.T / scores_XY.shape[1] ** 0.5).fill_diagonal_(0)
        assert correlations_XX.abs().max() < 6.5
        assert abs(correlations_XX.std() - 1) < 0.15
    # A random matrix of so many rows and columns: what follows from a few numbers has a larger norm.
    norm = torch.linalg.matrix_norm(scores_LND[0], 2)
    assert norm < 1.05 * (600**0.5 + 500**0.5)


def test_every_bit_of_a_draw_is_balanced_and_goes_with_no_other() -> None:
    keys_BT = make_keys(50, 100)
    drawn_ND = sum(draw(keys_BT, 64, share).int() for share in [i / 256 for i in range(1, 256)])
    assert isinstance(drawn_ND, Tensor)
    # Uniform over 256 values: χ² with 255 degrees of freedom.
    for place in range(4):
        counts = torch.bincount(drawn_ND[:, place::4].flatten(), minlength=256).double()
        expected = counts.sum() / 256
        assert abs((counts - expected).square().sum() / expected - 255) < 5 * math.sqrt(2 * 255)
    bits_8ND = torch.stack([(drawn_ND >> bit) & 1 for bit in range(8)])
    for bit, other in itertools.combinations(range(8), 2):
        assert_near((bits_8ND[bit] ^ bits_8ND[other]).double().mean(), 0.5, drawn_ND.numel())
    # Bits of neighbours, too.
    for bit, other in itertools.product(range(8), repeat=2):
        crossed = bits_8ND[bit, :, 1:] ^ bits_8ND[other, :, :-1]
        assert_near(crossed.double().mean(), 0.5, crossed.numel())


@pytest.mark.parametrize("num_columns", [1, 4, 37, 64])
def test_compiled_and_plain_code_draw_the_same(num_columns: int) -> None:
    def kept(keys_BT: Tensor, layer: Tensor) -> Tensor:
        values_ND = torch.empty(keys_BT.numel(), num_columns)
        return TokenDropout(keys_BT, columns_2W, layer).draw(values_ND, 0.3)

    columns_2W = make_column_keys(torch.device("cpu"))

    torch._dynamo.reset()
    compiled = torch.compile(kept, backend="eager", dynamic=True, fullgraph=True)
    for num_tokens, layer in ((3, 0), (50, 7), (9, 2**20 + 3)):
        keys_BT = make_keys(2, num_tokens)
        assert torch.equal(compiled(keys_BT, make_layer_key(layer)), kept(keys_BT, make_layer_key(layer)))


class Net(nn.Module):
    """Layers that take (B, T, D) and (B·T, D), and dropout alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 6, bias=False)
        self.dropout = nn.Dropout(0.25)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.first(values)))
        return self.second(hidden.flatten(0, -2))


def adapted(dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"], lora_dropout=dropout)
    model = get_peft_model(Net(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)  # a fresh adapter's B is zero
    return model.double()


VALUES_BTD = torch.randn(4, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kernels", [CPU, GPU], ids=["CPU", "GPU"])
def test_outputs_are_those_of_the_masks_in_turn(kernels: Kernels) -> None:
    model = adapted()
    net, keys_BT = model.get_submodule("base_model.model"), make_keys(4, 5)

    def adapt(layer: nn.Module, inputs: Tensor, number: int) -> Tensor:
        dropped = inputs * draw(keys_BT, inputs.shape[-1], 0.5, number) / 0.5
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return layer.base_layer(inputs) + 5 / 3 * dropped @ a.T @ b.T

    values_ND = VALUES_BTD.flatten(0, 1).clone().requires_grad_()
    hidden_ND = torch.tanh(adapt(net.first, values_ND, 0))
    # The dropout layers of the adapters come before it.
    hidden_ND = hidden_ND * draw(keys_BT, 20, 0.25, 2**20 + 2) / 0.75
    outputs = adapt(net.second, hidden_ND, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(outputs.sin().sum(), [values_ND, *trained])

    install_kernels(model, kernels)
    values = VALUES_BTD.clone().requires_grad_()
    with drawing_from(keys_BT):
        found = model(values)
        torch.testing.assert_close(found, outputs)
        gradients = torch.autograd.grad(found.sin().sum(), [values, *trained])
    torch.testing.assert_close(gradients[0].flatten(0, 1), expected[0])
    torch.testing.assert_close(gradients[1:], expected[1:])


def test_the_backward_pass_drops_what_the_forward_pass_did() -> None:
    model = adapted()
    install_kernels(model, CPU)
    values = VALUES_BTD[:2, :3].clone().requires_grad_()
    with drawing_from(make_keys(2, 3)):
        assert torch.autograd.gradcheck(model, values)


def test_rows_are_dropped_alike_whatever_they_are_run_with() -> None:
    model = adapted()
    install_kernels(model, CPU)
    keys_BT = make_keys(4, 5)

    def run(rows: list[int]) -> Tensor:
        with drawing_from(keys_BT[rows]):
            return model(VALUES_BTD[rows]).view(len(rows), 5, 6)

    whole = run([0, 1, 2, 3])
    torch.testing.assert_close(torch.cat([run([0]), run([1, 2, 3])]), whole)
    torch.testing.assert_close(run([3, 1, 0, 2]), whole[[3, 1, 0, 2]])
    with drawing_from(keys_BT.reshape(1, -1)):  # all of it in one row
        torch.testing.assert_close(model(VALUES_BTD.reshape(1, -1, 12)).view(4, 5, 6), whole)
    assert not torch.allclose(run([0, 0])[0], whole[1])


def test_some_tokens_alone_drop_what_they_drop_among_all() -> None:
    layer = nn.Sequential(nn.Dropout(0.5))
    install_kernels(layer, CPU)
    positions_N = torch.tensor([1, 7, 13, 19])
    with drawing_from(make_keys(4, 5)):
        whole = layer(VALUES_BTD).flatten(0, 1)
        with drawing_at(positions_N):
            some = layer(VALUES_BTD.flatten(0, 1)[positions_N].unsqueeze(0))
        assert torch.equal(some[0], whole[positions_N])
        assert torch.equal(layer(VALUES_BTD).flatten(0, 1), whole)


def test_what_is_no_row_for_each_token_is_drawn_by_torch() -> None:
    layer = nn.Sequential(nn.Dropout(0.5))
    plain = nn.Dropout(0.5)
    install_kernels(layer, CPU)
    with drawing_from(make_keys(4, 5)):
        for shape in ((4, 2, 5, 5), (3, 12), (7,), (5, 4, 12)):
            torch.manual_seed(0)
            found = layer(torch.ones(shape))
            torch.manual_seed(0)
            assert torch.equal(found, plain(torch.ones(shape)))
        assert torch.equal(layer.eval()(VALUES_BTD), VALUES_BTD)


@pytest.mark.parametrize("kernels", [CPU, GPU], ids=["CPU", "GPU"])
def test_nothing_but_keys_is_kept(kernels: Kernels) -> None:
    keys_BT = make_keys(4, 5)

    def count_kept(model: nn.Module, keys_BT: Tensor | None) -> int:
        """Return the bytes that are kept, besides weights and keys."""
        install_kernels(model, kernels)
        kept: dict[int, int] = {}
        with (
            drawing_from(keys_BT),
            torch.autograd.graph.saved_tensors_hooks(
                lambda saved: (
                    kept.setdefault(saved.untyped_storage().data_ptr(), saved.untyped_storage().nbytes())
                    and saved
                ),
                lambda saved: saved,
            ),
        ):
            output = model(VALUES_BTD.clone().requires_grad_())
        held = [
            *model.parameters(),
            *(() if keys_BT is None else (keys_BT, make_column_keys(keys_BT.device))),
        ]
        for tensor in held:
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        assert output.requires_grad
        return sum(kept.values())

    without = adapted(dropout=0.0)
    without.get_submodule("base_model.model").dropout.p = 0.0
    dropped_tanh = 4 * 5 * 20 * 8  # what the layer behind it takes is another tensor than what tanh keeps
    num_layers = 3
    assert count_kept(adapted(), keys_BT) == count_kept(without, keys_BT) + dropped_tanh + 4 * num_layers
    assert count_kept(adapted(), None) > count_kept(adapted(), keys_BT)
