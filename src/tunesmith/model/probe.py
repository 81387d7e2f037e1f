"""What the model at hand can be trained with, found by trying: attention, packed rows, the fused loss.

All of it is collective under FSDP: every rank must call it. The model is left in the mode it was in.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.compat import attention_name, can_set_attention
from tunesmith.data.batches import Batch
from tunesmith.model.attention_choice import BACKENDS_THAT_KNOW_ALL, EAGER
from tunesmith.model.attention_probe import attends_as_eager
from tunesmith.model.kernels.attention import VARLEN, VARLEN_ON_TRIAL, Trial, compute_logits
from tunesmith.model.kernels.loss import can_fuse_loss
from tunesmith.model.load import attention_of, narrowest_window
from tunesmith.parallel.collectives import holds_on_all_ranks
from tunesmith.parallel.fsdp import release_gathered

logger = logging.getLogger(__name__)

_LENGTHS = (7, 11, 9)


def use_varlen_attention(model: Any, device: torch.device, dtype: torch.dtype, max_seq_length: int) -> bool:
    """Let the model attend with `varlen`; keep its own backend if that gives other logits, or mixes examples.

    Its windows are tried where examples of `max_seq_length` tokens reach beyond them.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not can_set_attention(base):
        return False
    own = attention_name(base)
    (example, *_) = _make_examples(model)
    trial = Trial()
    with _evaluating(model):
        (expected,) = _packed_logits(model, [example], device)
        base.set_attn_implementation(VARLEN_ON_TRIAL)
        (found,) = _packed_logits(model, [example], device, trial)
        narrow = max_seq_length > narrowest_window(model)
        if not attends_as_eager(model, _pack([example]).to(device), VARLEN, narrow):
            trial.problems.append("a layer attends otherwise")
        model.train()  # there it may have dropout, which `varlen` lacks
        (trained,) = _packed_logits(model, [example], device, trial)
        if not (_distance(expected, found) < _rounding(dtype) and trained.isfinite().all()):
            trial.problems.append("the logits are others, or none")
        if not keeps_examples_apart(model, device, dtype):
            trial.problems.append("packed examples see one another")
        fits = holds_on_all_ranks(not trial.problems, device)
        if not fits:
            reason = next(iter(trial.problems), "another worker can't")
            logger.warning("attention `%s` gives way to `%s`, which is slower: %s", VARLEN, own, reason)
        base.set_attn_implementation(VARLEN if fits else own)
    return fits


def attends_rightly(model: nn.Module, device: torch.device) -> bool:
    """Return whether the model's own attention backend leaves out nothing of what its layers ask for, on this rank."""
    own = attention_of(model)
    if own in BACKENDS_THAT_KNOW_ALL:
        return True
    (example, *_) = _make_examples(model)
    with _evaluating(model):
        return attends_as_eager(model, _pack([example]).to(device), own, narrow_windows=True)


def attend_eagerly(model: Any) -> None:
    """Let the model attend as its own code does where no backend is named."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(EAGER)


def keeps_examples_apart(model: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether, in a packed sequence, no example sees another, and each is computed as if alone.

    Three examples are packed. Changing the middle one must leave the logits of its neighbours as they
    are, and each neighbour alone must give the logits it has in the pack.
    """
    first, middle, last, other = _make_examples(model)
    with _evaluating(model):
        before = _packed_logits(model, [first, middle, last], device)
        after = _packed_logits(model, [first, other, last], device)
        alone = [_packed_logits(model, [example], device)[0] for example in (first, last)]
    neighbours = (0, 2)
    rounding = _rounding(dtype)
    unmoved = all(_distance(before[i], after[i]) < rounding / 10 for i in neighbours)
    same = all(_distance(before[i], lone) < rounding for i, lone in zip(neighbours, alone, strict=True))
    return unmoved and same


def fuses_loss(model: nn.Module, device: torch.device) -> bool:
    """Return whether the model's loss can be computed without its logits."""
    with _evaluating(model):
        fuses = can_fuse_loss(model, _pack(_make_examples(model)).to(device))
    return holds_on_all_ranks(fuses, device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        # An optimizer made now would miss the slices of gathered weights.
        release_gathered(model)


def _make_examples(model: Any) -> list[Tensor]:
    """Return three examples of random tokens, and another of the second one's length."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    lengths = (*_LENGTHS, _LENGTHS[1])
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def _pack(examples: list[Tensor]) -> Batch:
    """Return a batch of one row that holds the examples; all of each but its first token is trained."""
    ids_T = torch.cat(examples)
    starts = [0, *itertools.accumulate(len(example) for example in examples)]
    positions_N = torch.cat([torch.arange(start, end - 1) for start, end in itertools.pairwise(starts)])
    position_ids_T = torch.cat([torch.arange(len(example)) for example in examples])
    return Batch(
        ids_T.unsqueeze(0),
        position_ids_T.unsqueeze(0),
        positions_N,
        ids_T[positions_N + 1],
        torch.tensor(starts, dtype=torch.int32),
        max(len(example) for example in examples),
    )


def _packed_logits(
    model: Any, examples: list[Tensor], device: torch.device, trial: Trial | None = None
) -> list[Tensor]:
    batch = _pack(examples).to(device)
    logits_1TV = compute_logits(model, batch, trial)
    return list(logits_1TV[0].float().split([len(example) for example in examples]))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def _rounding(dtype: torch.dtype) -> float:
    """Return how far two ways to compute the same logits may part, as a share of the largest."""
    return 1e-4 if dtype == torch.float32 else 5e-2
