"""The summed cross-entropy at trained positions alone is that of the model's own logits and loss."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    PretrainedConfig,
)

from support.step_costs import BytesMoved
from support.tiny_models import FAMILIES
from tunesmith.data.batches import Batch, empty_batch
from tunesmith.model.kernels.loss import (
    GPU_LOGITS,
    LogitsAtATime,
    _cut_wide,
    _LinearCrossEntropy,
    _pick,
    _slice_logits,
    _Weights,
    can_fuse_loss,
    sum_cross_entropy,
    token_cross_entropies,
)

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
HEADS: dict[str, PretrainedConfig] = {
    "gemma2, which caps its logits": Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.5),
    "cohere, which scales its logits": CohereConfig(**SHAPE, logit_scale=0.25, pad_token_id=0),
    "granite, which divides its logits": GraniteConfig(**SHAPE, logits_scaling=5.0),
    "gpt2, which names everything otherwise": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300),
}


def batch_of(trained_BT: torch.Tensor, vocab_size: int) -> tuple[Batch, torch.Tensor]:
    """Return a random batch that trains these tokens, and labels that say the same in transformers' way."""
    size, length = trained_BT.shape
    ids_BT = torch.randint(vocab_size, (size, length), generator=torch.Generator().manual_seed(0))
    labels_BT = torch.where(trained_BT, ids_BT, -100)
    predictors_BT = torch.cat([trained_BT[:, 1:], torch.zeros(size, 1, dtype=torch.bool)], dim=1)
    positions_N = predictors_BT.flatten().nonzero().squeeze(1)
    position_ids_BT = torch.arange(length).repeat(size, 1)
    starts = torch.arange(0, size * length + 1, length, dtype=torch.int32)
    targets_N = ids_BT.flatten()[positions_N + 1]
    return Batch(ids_BT, position_ids_BT, positions_N, targets_N, starts, length), labels_BT


def some_tokens(size: int = 3, length: int = 20) -> torch.Tensor:
    trained_BT = torch.rand(size, length, generator=torch.Generator().manual_seed(1)) < 0.4
    trained_BT[:, 0] = False  # nothing precedes it
    return trained_BT


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_transformers(family: str, model_of: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of(family))
    check_against_transformers(model)


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
def test_what_a_model_does_with_its_logits_still_applies(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # far from uniform logits
    check_against_transformers(model.eval())
    batch, _ = batch_of(some_tokens(), 300)
    logits_BTV = model(input_ids=batch.input_ids_BT).logits
    expected = F.cross_entropy(logits_BTV.flatten(0, 1)[batch.positions_N], batch.targets_N, reduction="sum")
    torch.testing.assert_close(sum_cross_entropy(model, batch), expected, rtol=1e-6, atol=1e-5)
    raw_BTV = model.get_output_embeddings()(model.base_model(batch.input_ids_BT).last_hidden_state)
    raw = F.cross_entropy(raw_BTV.flatten(0, 1)[batch.positions_N], batch.targets_N, reduction="sum")
    assert (abs(raw - expected) > 1.0) == (config.model_type != "gpt2")


def check_against_transformers(model: nn.Module) -> None:
    batch, labels_BT = batch_of(some_tokens(), model.config.vocab_size)
    num_trained = len(batch.targets_N)
    theirs = model(input_ids=batch.input_ids_BT, labels=labels_BT).loss
    theirs.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = sum_cross_entropy(model, batch) / num_trained
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5)
    model.zero_grad()


@pytest.mark.parametrize(
    "at_a_time", [(1, 1), (700, 1), (1 << 12, 700), (1 << 24, 1 << 24), (1 << 11, 1, 4, False)]
)
@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_loss_and_its_gradients_are_the_plain_ones(
    family: str,
    trains_head: bool,
    at_a_time: tuple[Any, ...],
    model_of: Callable[[str], Path],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of(family))
    head = model.get_output_embeddings()
    if trains_head:
        head.bias = nn.Parameter(torch.randn(head.out_features))
    else:
        head.weight = nn.Parameter(head.weight.detach(), requires_grad=False)
    batch, _ = batch_of(some_tokens(), model.config.vocab_size)
    plain = sum_cross_entropy(model, batch)
    fused = sum_cross_entropy(model, batch, True, LogitsAtATime(*at_a_time))
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(plain / 7, trained, allow_unused=True)
    for mine, its in zip(torch.autograd.grad(fused / 7, trained, allow_unused=True), expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    empty = sum_cross_entropy(model, empty_batch(0), fused=True)
    empty.backward()
    assert empty.item() == 0


@pytest.mark.parametrize("at_a_time", [(700, 1), (1 << 24, 1 << 24), (1 << 11, 1, 4, False)])
@pytest.mark.parametrize("head", ["frozen", "trained", "biased"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # whose head is tied to the embeddings, and isn't
def test_each_token_weighs_its_gradient_by_its_own_value(
    family: str,
    head: str,
    at_a_time: tuple[Any, ...],
    model_of: Callable[[str], Path],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of(family))
    output = model.get_output_embeddings()
    if head == "frozen":
        output.weight = nn.Parameter(output.weight.detach(), requires_grad=False)
    if head == "biased":
        output.bias = nn.Parameter(torch.randn(output.out_features))
    batch, _ = batch_of(some_tokens(), model.config.vocab_size)
    values_N = torch.randn(len(batch.targets_N), generator=torch.Generator().manual_seed(2))
    exact = differentiate_tokens(deepcopy(model).double(), batch, values_N, fused=False)
    for fused in (False, True):
        found = differentiate_tokens(model, batch, values_N, fused, LogitsAtATime(*at_a_time))
        for mine, its in zip(found, exact, strict=True):
            torch.testing.assert_close(mine, its.float(), rtol=0, atol=5e-6 * float(its.abs().max()))


def differentiate_tokens(
    model: Any, batch: Batch, values_N: torch.Tensor, fused: bool, at_a_time: LogitsAtATime | None = None
) -> list[torch.Tensor]:
    """Return the cross-entropy of each target, and the gradients of the sum of their products with the values."""
    losses_N = token_cross_entropies(model, batch, fused, at_a_time)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((losses_N * values_N).sum(), trained, allow_unused=True)
    return [losses_N.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens_of_a_batch_without_targets_have_gradients_of_zero(
    family: str, fused: bool, model_of: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of(family)).train()
    losses_N, *gradients = differentiate_tokens(model, empty_batch(0), torch.empty(0), fused)
    assert losses_N.shape == (0,)
    assert gradients
    assert all(bool((gradient == 0).all()) for gradient in gradients)


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
def test_the_loss_is_fused_only_where_the_model_leaves_its_logits_alone(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch, _ = batch_of(some_tokens(), 300)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert can_fuse_loss(model, batch) == (config.model_type == "gpt2")
    assert "forward" not in model.get_output_embeddings().__dict__


def test_the_loss_is_not_fused_with_an_adapter_on_the_output_layer(model_of: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of("llama"))
    batch, _ = batch_of(some_tokens(), model.config.vocab_size)
    assert can_fuse_loss(model, batch)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    assert not can_fuse_loss(adapted, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_targets_costs_nothing_and_moves_nothing(
    family: str, model_of: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of(family)).train()
    loss = sum_cross_entropy(model, empty_batch(0))
    assert loss.item() == 0.0
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(bool((gradient == 0).all()) for gradient in gradients)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=12).map(lambda trained: [False, *trained]))
def test_any_set_of_trained_tokens_sums_their_losses(
    model_of: Callable[[str], Path], trained: list[bool]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of("llama"))
    batch, _ = batch_of(torch.tensor([trained]), 256)
    with torch.no_grad():
        log_probs_TV = model(input_ids=batch.input_ids_BT).logits[0].log_softmax(-1)
        ids_T = batch.input_ids_BT[0]
        expected = -sum(log_probs_TV[t - 1, ids_T[t]].item() for t in range(1, len(trained)) if trained[t])
        assert sum_cross_entropy(model, batch).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_output_layer_sees_trained_positions_only(model_of: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of("llama"))
    batch, _ = batch_of(some_tokens(), 256)
    shapes = []
    model.lm_head.register_forward_hook(lambda _, arguments, logits: shapes.append(logits.shape))
    sum_cross_entropy(model, batch)
    model(input_ids=batch.input_ids_BT)
    assert shapes == [
        (1, len(batch.targets_N), model.config.vocab_size),
        (3, 20, model.config.vocab_size),
    ]


def differentiate_logits(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, at_a_time: LogitsAtATime
) -> list[torch.Tensor]:
    """Return the loss of logits that are products, and its gradient by the hidden states."""
    hidden_ND = hidden_ND.clone().requires_grad_()
    loss = _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, None, None, None, targets_N, len(hidden_ND), at_a_time
    )
    loss.sum().backward()
    assert hidden_ND.grad is not None
    return [loss.squeeze(), hidden_ND.grad]


def test_gradients_narrowed_as_they_are_made_are_as_near_as_those_of_the_other_way() -> None:
    """In bfloat16, of tokens that are all but certain too, whose own gradient is a difference of near numbers."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(37, 32, generator=generator).bfloat16()
    weight_VD = torch.randn(300, 32, generator=generator).bfloat16()
    logits_NV = hidden_ND @ weight_VD.T
    targets_N = torch.where(torch.arange(37) % 2 == 0, logits_NV.argmax(1), torch.arange(37))
    wide_NV = logits_NV.double().requires_grad_()
    expected = F.cross_entropy(wide_NV, targets_N, reduction="sum")
    expected.backward()
    assert wide_NV.grad is not None
    exact_ND = wide_NV.grad @ weight_VD.double()
    errors = []
    for ways in ((1 << 24, 1 << 24), (1 << 11, 1, 4, False)):
        loss, gradient_ND = differentiate_logits(hidden_ND, weight_VD, targets_N, LogitsAtATime(*ways))
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-5)
        errors.append(float((gradient_ND.double() - exact_ND).norm() / exact_ND.norm()))
    assert errors[1] < 1.1 * errors[0] < 0.01


def test_gpus_hold_whole_tiles_of_logits_and_pass_over_them_less_often() -> None:
    vocab_size, num_tokens = 128_256, 8192
    with torch.device("meta"):
        head = _Weights(torch.empty(vocab_size, 64, dtype=torch.bfloat16), None, None, None)
        hidden_ND = torch.empty(num_tokens, 64, dtype=torch.bfloat16)
        targets_N = torch.empty(num_tokens, dtype=torch.int64)
    moved = []
    for at_a_time in (GPU_LOGITS, GPU_LOGITS._replace(in_cache=True)):
        with BytesMoved() as bytes_moved:
            slices = list(_slice_logits(hidden_ND, head, num_tokens, at_a_time))
            for rows, logits_nV, wide_2wV in slices:
                for part in _cut_wide(logits_nV, wide_2wV):
                    _pick(logits_nV[part], targets_N[rows][part], wide_2wV, differentiate=True)
        moved.append(bytes_moved.total / (num_tokens * vocab_size))
        assert {len(logits_nV) for _, logits_nV, _ in slices} == {1024}
    # Bytes a logit; what is changed in place, or picked from, counts as read whole.
    assert moved == pytest.approx([34, 58], abs=0.5)
