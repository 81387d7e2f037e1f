"""What GPUs attend with, driven on a CPU: torch's kernel on tensors without data, and as its versions are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.model.kernels.attention import _attend_on_cpu, _attend_on_gpu

LENGTHS = (5, 40, 3)
STARTS = torch.tensor([0, 5, 45, 48], dtype=torch.int32)
WIDTH = 16
OF_2_13 = torch.nn.attention.varlen.varlen_attn


def called_as_in_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    output, *_ = torch.ops.torch_attn._varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, False, scale, list(window_size)
    )
    return output


def attend_as_documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Compute what torch 2.11's `varlen_attn` says that it does: `window_size` counts tokens before and after."""
    before, after = window_size
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    outputs = []
    for q, k, v in zip(*(states.split(LENGTHS) for states in (query, key, value)), strict=True):
        seen = torch.ones(len(q), len(q), dtype=torch.bool).tril(after)
        seen = seen if before < 0 else seen.triu(-before)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def make_states(num_heads: int, num_groups: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    # As projections give them: heads before tokens, as a view.
    generator = torch.Generator().manual_seed(0)
    states = []
    for heads in (num_heads, num_groups, num_groups):
        made = torch.randn(1, sum(LENGTHS), heads, WIDTH, generator=generator, dtype=dtype)
        states.append(made.to(device).requires_grad_())
    return states


def attend_on_gpu(states: list[Tensor], window: int | None) -> Tensor:
    heads_first = [made.transpose(1, 2) for made in states]
    return _attend_on_gpu(*heads_first, WIDTH**-0.5, STARTS.to(states[0].device), max(LENGTHS), window)


class _Operations(TorchDispatchMode):
    """Notes which operations run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("varlen_attn", [OF_2_13, called_as_in_2_11])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_it_runs_forward_and_backward_and_copies_nothing(
    heads: tuple[int, int],
    window: int | None,
    varlen_attn: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    states = make_states(*heads, "meta", torch.bfloat16)
    output = attend_on_gpu(states, window)
    assert output.shape == (1, sum(LENGTHS), heads[0], WIDTH)
    with _Operations() as backward:
        gradients = torch.autograd.grad(output, states, torch.empty_like(output))
    assert [gradient.shape for gradient in gradients] == [made.shape for made in states]
    assert "torch_attn::_varlen_attn_backward" in backward.names
    assert not [name for name in backward.names if "select" in name or "copy" in name or "clone" in name]


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_it_asks_for_what_cpus_compute(
    heads: tuple[int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attend_as_documented)
    states = make_states(*heads, "cpu", torch.float32)
    found = attend_on_gpu(states, window)
    heads_first = [made.transpose(1, 2) for made in states]
    expected = _attend_on_cpu(*heads_first, WIDTH**-0.5, STARTS, max(LENGTHS), window)
    torch.testing.assert_close(found, expected)
