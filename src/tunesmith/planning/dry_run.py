"""A microbatch on tensors without data: what lives at once in its forward and backward pass.

On torch's meta device every product costs nothing, and every tensor says how many bytes it would hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tunesmith.compat import can_set_attention
from tunesmith.errors import ModelError
from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.kernels.dropout import drawing_from, make_column_keys
from tunesmith.model.kernels.install import Kernels, install_kernels, kernels_for
from tunesmith.model.kernels.loss import can_fuse_loss, sum_cross_entropy
from tunesmith.parallel.activation_checkpointing import find_decoder_blocks, recompute_all, recompute_none
from tunesmith.planning.live_bytes import AnswersNo, LiveCounter
from tunesmith.planning.made_up_batch import FEW_TOKENS, make_batch
from tunesmith.planning.shared_inputs import find_shared_inputs
from tunesmith.planning.stand_ins import name_stand_in


@dataclass(frozen=True)
class LiveBytes:
    """Bytes that live during a microbatch, besides weights and their gradients.

    Attributes:
        activations: before the loss.
        loss_peak: at most, until the loss is done.
        backward_peak: at most, after that.
    """

    activations: int
    loss_peak: int
    backward_peak: int

    def plus(self, num_bytes: int) -> LiveBytes:
        """Return what lives when that many more are kept all the time."""
        return LiveBytes(
            self.activations + num_bytes, self.loss_peak + num_bytes, self.backward_peak + num_bytes
        )

    def times(self, factor: int) -> LiveBytes:
        """Return what lives in a `factor` times wider dtype."""
        return LiveBytes(factor * self.activations, factor * self.loss_peak, factor * self.backward_peak)


@dataclass(frozen=True)
class Microbatch:
    """What lives during a microbatch, however many blocks are recomputed.

    Attributes:
        kept: when none is.
        recomputed: when all are.
        savings: bytes of activations that recomputing each block saves.
    """

    kept: LiveBytes
    recomputed: LiveBytes
    savings: tuple[int, ...]

    def recompute(self, num_blocks: int) -> LiveBytes:
        """Return what lives when the first `num_blocks` are."""
        less = self.kept.plus(-sum(self.savings[:num_blocks]))
        # What a recomputed block works with is back for its own backward pass.
        return LiveBytes(
            less.activations,
            max(less.loss_peak, self.recomputed.loss_peak),
            max(less.backward_peak, self.recomputed.backward_peak),
        )

    def times(self, factor: int) -> Microbatch:
        """Return the same in a `factor` times wider dtype."""
        savings = tuple(factor * saving for saving in self.savings)
        return Microbatch(self.kept.times(factor), self.recomputed.times(factor), savings)


def planned_kernels(device_type: str, attention: str = VARLEN) -> Kernels:
    """Return what a model computes with on devices of this type, as far as tensors without data can.

    Besides `varlen`, `attention` may be any backend that the model can be run with.
    """
    # Norms are counted as the CPU's, which keep as much.
    return replace(
        kernels_for(device_type), attention=name_stand_in(attention, device_type), torch_norms=False
    )


def measure_microbatch(
    model: Any, num_tokens: int, example_tokens: int, kernels: Kernels, drops_by_token: bool = True
) -> Microbatch:
    """Return what one microbatch of the meta model holds: `num_tokens` in examples of `example_tokens`.

    What isn't dropped `drops_by_token` keeps masks.
    One block of each kind is run; the others hold as much. A model whose blocks aren't known is one, and whole.

    Raises:
        ModelError: the model can't be run so.
    """
    with told_beforehand(model), one_block_of_each_kind(model) as others:
        fused = fuses_loss_on_meta(model)
        wanted = model, num_tokens, example_tokens, kernels, fused, drops_by_token
        runs = [run_microbatch(*wanted)]
        can_recompute = model.supports_gradient_checkpointing
        if can_recompute:
            recompute_all(model)
        runs.append(run_microbatch(*wanted))
        recompute_none(model)
    if others is None:
        (kept, _), (recomputed, _) = runs
        return Microbatch(kept, recomputed, (kept.activations - recomputed.activations,) * can_recompute)
    kept, recomputed = (
        live.plus(sum(of_blocks[1:][kind] for kind in others) - sum(of_blocks[1:]))
        for live, of_blocks in runs
    )
    (_, all_kept), (_, all_recomputed) = runs
    savings = [all_kept[1:][kind] - all_recomputed[1:][kind] for kind in others]
    of_first = kept.activations - recomputed.activations - sum(savings)
    return Microbatch(kept, recomputed, (of_first, *savings))


def run_microbatch(
    model: Any,
    num_tokens: int,
    example_tokens: int,
    kernels: Kernels,
    fused: bool | None = None,
    drops_by_token: bool = True,
) -> tuple[LiveBytes, list[int]]:
    """Run one microbatch through all blocks of the meta model, recomputing those that are flagged for it.

    `kernels` take the place of those that the model had; `fused` says whether its loss is (None: look). What isn't
    dropped `drops_by_token` keeps masks. Returns what lives, and what of the activations each block adds.
    """
    if fused is None:
        fused = fuses_loss_on_meta(model)
    install_kernels(model, kernels, find_shared_inputs(model))
    attend_with(model, kernels.attention)
    head = model.get_output_embeddings()
    batch = make_batch(num_tokens, example_tokens, is_flat=kernels.attention.startswith(VARLEN))
    keys_BT = batch.input_ids_BT.int() if drops_by_token else None
    column_keys = make_column_keys(batch.input_ids_BT.device)  # the same for all models
    live = LiveCounter([*model.parameters(), *model.buffers(), column_keys])
    before_loss: list[int] = []
    blocks = find_decoder_blocks(model)
    handles = [
        head.register_forward_pre_hook(lambda *_: before_loss.append(live.now)),
        *(block.register_forward_pre_hook(lambda *_: live.note_next()) for block in blocks[:1]),
        *(block.register_forward_hook(lambda *_: live.note_next()) for block in blocks),
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Gradients are counted apart.
            handles.append(parameter.register_post_accumulate_grad_hook(_forget_gradient))
    try:
        with drawing_from(keys_BT), live:
            loss = sum_cross_entropy(model, batch, fused=fused, at_a_time=kernels.logits)
            borders, loss_peak, live.peak = [*live.noted], live.peak, live.now
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    of_blocks = [after - before for before, after in itertools.pairwise(borders)]
    return LiveBytes(before_loss[0], loss_peak, live.peak), of_blocks


def fuses_loss_on_meta(model: Any) -> bool:
    """Return whether the loss of the meta model can be fused: what `fuses_loss` will find of the model with weights."""
    with AnswersNo():
        try:
            return can_fuse_loss(model, make_batch(FEW_TOKENS, FEW_TOKENS, is_flat=True))
        except (RuntimeError, NotImplementedError):  # it adds tensors of its own to its logits
            return False


def attend_with(model: Any, attention: str) -> None:
    """Let the meta model attend with this backend, if it takes one by name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if can_set_attention(base):
        base.set_attn_implementation(attention)


def _kind_of(block: nn.Module) -> tuple[object, ...]:
    """Return what blocks have in common that keep equally much."""
    weights = ((name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters())
    return type(block), *weights


@contextmanager
def told_beforehand(model: Any) -> Iterator[None]:
    """Let what fails inside say that the model can't be run without data.

    Raises:
        ModelError: it can't.
    """
    try:
        yield
    except Exception as error:  # a model's own code may fail on tensors without data in any way
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise ModelError(
            f"the memory of a `{model.config.model_type}` model can't be told beforehand: {reason}",
            "try a step of training",
        ) from error


@contextmanager
def one_block_of_each_kind(model: Any) -> Iterator[list[int] | None]:
    """Leave the model its first block and one of each kind of the others; yield which of these each of them is.

    A model whose blocks aren't known keeps all: None.
    """
    blocks = find_decoder_blocks(model)
    if not blocks:
        yield None
        return
    # The first block's input needs no gradient, so that it may keep less than others of its kind.
    kinds = {_kind_of(block): block for block in blocks[1:]}
    with _blocks_replaced(model, blocks, [blocks[0], *kinds.values()]):
        yield [list(kinds).index(_kind_of(block)) for block in blocks[1:]]


@contextmanager
def _blocks_replaced(model: nn.Module, before: list[nn.Module], after: list[nn.Module]) -> Iterator[None]:
    (held,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and list(m) == before)
    del held[:]
    held.extend(after)
    try:
        yield
    finally:
        del held[:]
        held.extend(before)


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None
