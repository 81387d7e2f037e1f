"""Whether an attention backend computes what the model's own plain attention does, layer by layer, found by trying.

The model runs twice over the same tokens: once its layers attend as its own code does where no backend is named
(eager), once as the backend does. Either way each layer hands on the values alone, so that both runs give all layers
the same inputs, and what their attention makes of them is compared: in float32 where the backend computes in it, with
the scores as they are, and with scores so large that a cap shows.

Shapes: H heads, K of them for keys and values, T tokens, D head width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface

from tunesmith.compat import attention_name, can_set_attention, eager_attention
from tunesmith.data.batches import Batch
from tunesmith.model.attention_choice import EAGER, WINDOWS, is_flash
from tunesmith.model.kernels.attention import VARLEN, compute_logits

logger = logging.getLogger(__name__)

# Twice what models cap their scores at; a cap far above shows too.
_LARGE_SCORE = 100.0
# Tokens: fewer than an example of the probe has.
_NARROW_WINDOW = 4

_ON_RECORD = "on_record"
_VARLEN_ON_RECORD = f"{VARLEN}_on_record"  # what begins so is told where examples begin


def attends_as_eager(model: Any, batch: Batch, backend: str, narrow_windows: bool) -> bool:
    """Return whether every layer attends with `backend` as it does eagerly, over a packed `batch`.

    With `narrow_windows`, examples of the batch reach beyond them. A model that doesn't take its attention by name is
    taken to be right. It has to be in evaluation mode. Collective under FSDP.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not can_set_attention(base):
        return True
    with _narrowed(model if narrow_windows else None), torch.no_grad():
        expected = _record(model, base, batch, EAGER)
        found = _record(model, base, batch, backend)
    if expected.problems:
        logger.debug("what `%s` should compute can't be told: %s", backend, expected.problems)
        return True
    problems = found.problems or _compare(expected.outputs, found)
    if problems:
        logger.debug("`%s` isn't the model's attention: %s", backend, problems)
    return not problems


@dataclass
class _Record:
    """What a backend made of the states of each layer, twice: of the scores as they are, and of large ones.

    Attributes:
        attend: the backend, as transformers calls it; None: the function of each module's own code.
        computes_in_half: whether that is all it computes in.
        outputs: (1, T, H, D) each, float32.
        problems: why there are no outputs.
    """

    attend: Callable[..., Any] | None
    computes_in_half: bool
    outputs: list[Tensor] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(
        self,
        module: nn.Module,
        states: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scaling: float | None,
        options: dict[str, Any],
    ) -> None:
        """Attend, and note what comes of it. An error would leave FSDP in the middle of a forward."""
        query, key, value = states
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attend = self.attend or eager_attention(module)
        if not self.computes_in_half:
            query, key, value, mask = (_widen(tensor) for tensor in (query, key, value, mask))
            options = {name: _widen(option) for name, option in options.items()}
        # SDPA's kernels for GPUs may round float32 to fewer bits.
        on_gpu = query.is_cuda and not self.computes_in_half
        try:
            # A power of two, so that nothing is rounded.
            enlargement = 2.0 ** round(math.log2(_LARGE_SCORE / _largest_score(query, key, scale)))
            with sdpa_kernel(SDPBackend.MATH) if on_gpu else nullcontext():
                for factor in (1.0, enlargement):
                    output_1THD, *_ = attend(
                        module, factor * query, key, value, mask, scaling=scale, **options
                    )
                    self.outputs.append(output_1THD.float())
        except Exception as error:  # a model's own code may fail in any way
            self.problems.append(f"{type(error).__name__}: {error}")


_record_at_work: ContextVar[_Record] = ContextVar("_record_at_work")


def attend_on_record(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return the values alone, of shape (1, T, H, D), and note what the backend at work makes of the states."""
    states = query_1HTD, key_1KTD, value_1KTD
    _record_at_work.get().add(module, states, attention_mask, scaling, options)
    num_groups = query_1HTD.shape[1] // key_1KTD.shape[1]
    return value_1KTD.repeat_interleave(num_groups, 1).transpose(1, 2).contiguous(), None


def _record(model: Any, base: Any, batch: Batch, backend: str) -> _Record:
    """Run the model, and return what its layers' attention computes with this backend."""
    attend = None if backend == EAGER else AttentionInterface()[backend]
    on_gpu = batch.input_ids_BT.is_cuda
    record = _Record(attend, computes_in_half=is_flash(backend) or (on_gpu and backend == VARLEN))
    own = attention_name(base)
    masks = AttentionMaskInterface()
    if backend in masks:
        AttentionMaskInterface.register(_ON_RECORD, masks[backend])
    at_work = _record_at_work.set(record)
    try:
        base.set_attn_implementation(_VARLEN_ON_RECORD if backend == VARLEN else _ON_RECORD)
        compute_logits(model, batch)
    finally:
        base.set_attn_implementation(own)
        _record_at_work.reset(at_work)
    return record


def _compare(expected: list[Tensor], found: _Record) -> list[str]:
    tolerance = 5e-2 if found.computes_in_half else 1e-4
    return [
        f"layer {number // 2} computes something else"
        for number, (a, b) in enumerate(zip(expected, found.outputs, strict=True))
        # NaN is something else too.
        if not float((a - b).abs().max()) <= tolerance * float(a.abs().max())
    ]


@contextmanager
def _narrowed(model: Any | None) -> Iterator[None]:
    """Let the windows of a model be narrower than an example; of None, do nothing."""
    configs = [] if model is None else [model.config, model.config.get_text_config()]
    holders: list[Any] = [*configs, *([] if model is None else model.modules())]
    before: list[tuple[Any, str, int]] = []
    try:
        for holder in holders:
            for name in WINDOWS:
                if isinstance(width := vars(holder).get(name), int) and width > _NARROW_WINDOW:
                    before.append((holder, name, width))
                    setattr(holder, name, _NARROW_WINDOW)
        yield
    finally:
        for holder, name, width in before:
            setattr(holder, name, width)


def _largest_score(query_1HTD: Tensor, key_1KTD: Tensor, scale: float) -> float:
    num_groups = query_1HTD.shape[1] // key_1KTD.shape[1]
    key_1HTD = key_1KTD.repeat_interleave(num_groups, 1).float()
    largest = (query_1HTD.float() @ key_1HTD.transpose(-1, -2)).abs().max() * abs(scale)
    return float(largest) or _LARGE_SCORE


def _widen(option: Any) -> Any:
    is_real = isinstance(option, Tensor) and option.is_floating_point()
    return option.float() if is_real else option


AttentionInterface.register(_ON_RECORD, attend_on_record)
AttentionInterface.register(_VARLEN_ON_RECORD, attend_on_record)
