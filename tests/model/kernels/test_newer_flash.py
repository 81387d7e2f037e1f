"""A newer FlashAttention is taken where it computes the same; what fails gives way, with its reason."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.library import Library
from torch.nn.attention import (
    current_flash_attention_impl,
    register_flash_attention_impl,
    restore_flash_attention_impl,
)

from support.families import family_model
from tunesmith.model.kernels import newer_flash
from tunesmith.model.kernels.newer_flash import activate_first, activate_newer_flash

HEADS = {"num_heads": 4, "num_groups": 2, "width": 16}
CPU = torch.device("cpu")


class Provider:
    """Kernels that a package brings to torch: here of `softmax`, which attention on a CPU takes."""

    def __init__(self, softmax: Any) -> None:
        self._softmax = softmax
        self.library: Library | None = None

    def register(self) -> Provider:
        self.library = Library("aten", "IMPL")
        self.library.impl("_softmax", self._softmax, "CPU")
        return self

    def remove(self) -> None:
        assert self.library is not None
        self.library._destroy()
        self.library = None


def softmax_by_hand(scores: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    powers = (scores - scores.amax(dim, keepdim=True)).exp()
    return powers / powers.sum(dim, keepdim=True)


def wrong_softmax(scores: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    return softmax_by_hand(2 * scores, dim, half_to_float)


def no_softmax(*_: Any) -> torch.Tensor:
    raise RuntimeError("heads of such a width are not supported")


@pytest.fixture
def providers() -> Iterator[dict[str, Provider]]:
    made = {
        "right": Provider(softmax_by_hand),
        "wrong": Provider(wrong_softmax),
        "failing": Provider(no_softmax),
    }
    for name, provider in made.items():
        register_flash_attention_impl(name, register_fn=provider.register)
    yield made
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()


@pytest.mark.filterwarnings("ignore::UserWarning")  # a kernel takes another's place
def test_the_first_that_computes_the_same_is_taken(
    providers: dict[str, Provider], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tunesmith"):
        # FA4's package isn't here.
        assert activate_first(["FA4", "failing", "wrong", "right"], CPU, **HEADS) == "right"
    assert current_flash_attention_impl() == "right"
    assert [name for name, provider in providers.items() if provider.library] == ["right"]
    reasons = [record.getMessage() for record in caplog.records]
    assert "FA4 gives way to FlashAttention 2: ModuleNotFoundError" in reasons[0]
    assert "failing gives way to FlashAttention 2: RuntimeError: heads of such a width" in reasons[1]
    assert "wrong gives way to FlashAttention 2: AssertionError" in reasons[2]
    assert len(reasons) == 3


@pytest.mark.filterwarnings("ignore::UserWarning")  # a kernel takes another's place
def test_where_none_works_torch_keeps_its_own(providers: dict[str, Provider]) -> None:
    assert activate_first(["failing", "wrong"], CPU, **HEADS) is None
    assert current_flash_attention_impl() is None
    assert not any(provider.library for provider in providers.values())


def test_by_default_none_is_tried_and_then_those_that_the_gpu_has(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, gpu = family_model("llama"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert newer_flash.NEWER == ()
    assert activate_newer_flash(gpu, model) is None
    monkeypatch.setattr(newer_flash, "NEWER", ("FA4", "FA3"))
    assert activate_newer_flash(CPU, model) is None
    assert activate_newer_flash(gpu, model) is None
    assert not caplog.records
    assert current_flash_attention_impl() is None
