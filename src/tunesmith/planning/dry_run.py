"""A microbatch on tensors without data: what lives at once in its forward and backward pass.

On torch's meta device every product costs nothing, and every tensor says how many bytes it would hold.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from tunesmith.compat import storage_key
from tunesmith.data.batches import Batch
from tunesmith.errors import ModelError
from tunesmith.model.kernels.attention import VARLEN, attend_within_examples
from tunesmith.model.kernels.install import Kernels, install_kernels, kernels_for
from tunesmith.model.kernels.loss import has_plain_head, sum_cross_entropy
from tunesmith.parallel.activation_checkpointing import find_decoder_blocks, recompute_all, recompute_none

_PLANNED_ON_CPU = f"{VARLEN}_planned_on_cpu"
_PLANNED_ON_GPU = f"{VARLEN}_planned_on_gpu"


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


def planned_kernels(device_type: str) -> Kernels:
    """Return what a model computes with on devices of this type, as far as tensors without data can."""
    attention = _PLANNED_ON_CPU if device_type == "cpu" else _PLANNED_ON_GPU
    # Norms are counted as the CPU's, which keep as much.
    return replace(kernels_for(device_type), attention=attention, torch_norms=False)


def measure_microbatch(model: Any, num_tokens: int, example_tokens: int, kernels: Kernels) -> Microbatch:
    """Return what one microbatch of the meta model holds: `num_tokens` in examples of `example_tokens`.

    One block of each kind is run; the others hold as much.

    Raises:
        ModelError: the model can't be run so.
    """
    try:
        blocks = find_decoder_blocks(model)
        # The first block's input needs no gradient, so that it may keep less than others of its kind.
        kinds = {_kind_of(block): block for block in blocks[1:]}
        with _blocks_replaced(model, blocks, [blocks[0], *kinds.values()]):
            runs = [run_microbatch(model, num_tokens, example_tokens, kernels)]
            recompute_all(model)
            runs.append(run_microbatch(model, num_tokens, example_tokens, kernels))
            recompute_none(model)
    except Exception as error:  # a model's own code may fail on tensors without data in any way
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise ModelError(
            f"the memory of a `{model.config.model_type}` model can't be told beforehand: {reason}",
            "try a step of training",
        ) from error
    others = [list(kinds).index(_kind_of(block)) for block in blocks[1:]]
    kept, recomputed = (
        live.plus(sum(of_blocks[1:][kind] for kind in others) - sum(of_blocks[1:]))
        for live, of_blocks in runs
    )
    (_, all_kept), (_, all_recomputed) = runs
    savings = [all_kept[1:][kind] - all_recomputed[1:][kind] for kind in others]
    of_first = kept.activations - recomputed.activations - sum(savings)
    return Microbatch(kept, recomputed, (of_first, *savings))


def run_microbatch(
    model: Any, num_tokens: int, example_tokens: int, kernels: Kernels
) -> tuple[LiveBytes, list[int]]:
    """Run one microbatch through all blocks of the meta model, recomputing those that are flagged for it.

    `kernels` take the place of those that the model had. Returns what lives, and what of the activations each block adds.
    """
    install_kernels(model, kernels)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(kernels.attention)
    head = model.get_output_embeddings()
    batch = _make_batch(num_tokens, example_tokens)
    live = _LiveCounter([*model.parameters(), *model.buffers()])
    before_loss: list[int] = []
    blocks = find_decoder_blocks(model)
    handles = [
        head.register_forward_pre_hook(lambda *_: before_loss.append(live.now)),
        blocks[0].register_forward_pre_hook(lambda *_: live.note_next()),
        *(block.register_forward_hook(lambda *_: live.note_next()) for block in blocks),
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Gradients are counted apart.
            handles.append(parameter.register_post_accumulate_grad_hook(_forget_gradient))
    try:
        with live:
            loss = sum_cross_entropy(model, batch, fused=has_plain_head(model), at_a_time=kernels.logits)
            borders, loss_peak, live.peak = [*live.noted], live.peak, live.now
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    of_blocks = [after - before for before, after in itertools.pairwise(borders)]
    return LiveBytes(before_loss[0], loss_peak, live.peak), of_blocks


def _kind_of(block: nn.Module) -> tuple[object, ...]:
    """Return what blocks have in common that keep equally much."""
    weights = ((name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters())
    return type(block), *weights


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


def _make_batch(num_tokens: int, example_tokens: int) -> Batch:
    starts = [*range(0, num_tokens, example_tokens), num_tokens]
    ids_1T = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
    # Every token but an example's first is a target; one more costs nothing.
    return Batch(
        ids_1T, ids_1T, ids_1T[0], ids_1T[0], torch.tensor(starts, dtype=torch.int32), example_tokens
    )


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _LiveCounter(TorchDispatchMode):
    """Counts the bytes of the meta tensors that are made inside and live; views of what was there before are free."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.noted: list[int] = []
        self._is_noting = False
        self._keys = {storage_key(tensor.untyped_storage()) for tensor in before}

    def note_next(self) -> None:
        """Note what lives when the next operation begins: until then a block's input may still be held."""
        self._is_noting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._is_noting:
            self.noted.append(self.now)
            self._is_noting = False
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.is_meta:
                self._add(output.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_key(storage), storage.nbytes()
        if key in self._keys:
            return
        self._keys.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._keys.remove(key)
        self.now -= size


def _attend_as_a_cpu(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    return attend_within_examples(
        module, query, key, value, attention_mask, **{**options, "sliding_window": None}
    )


def _attend_as_a_gpu(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    return _FlashAttention.apply(query, key, value), None


class _FlashAttention(torch.autograd.Function):
    """What FlashAttention keeps for its backward pass, and makes there. Shapes: (1, heads, tokens, width)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(states) for states in ctx.saved_tensors[:3])


AttentionInterface.register(_PLANNED_ON_CPU, _attend_as_a_cpu)
AttentionInterface.register(_PLANNED_ON_GPU, _attend_as_a_gpu)
