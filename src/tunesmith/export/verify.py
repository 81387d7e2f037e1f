"""Proof that an export is the tuned model: held against a merge that others' code has made."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tunesmith.config import ModelRef
from tunesmith.errors import ExportError, ModelError
from tunesmith.export.compare import count_inexact
from tunesmith.export.merge import Merge
from tunesmith.export.prompts import choose_prompts
from tunesmith.export.proof import Proof
from tunesmith.export.reference import compute_logits, load, load_merged, memory_of, widen
from tunesmith.export.sample import check_headers, prove_by_sample
from tunesmith.machine import available_memory
from tunesmith.model.adapters.embeddings import grow_embeddings
from tunesmith.model.adapters.folder import count_rows
from tunesmith.model.files.state import read_weights
from tunesmith.model.load import load_tokenizer
from tunesmith.model.vocabulary import count_known_tokens, has_unknown
from tunesmith.runs.tuned import TunedModel
from tunesmith.view.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_LOGITS_TOLERANCE = 1e-4


def prove(merge: Merge, tuned: TunedModel, files: ModelRef, folder: Path) -> Proof:
    """Hold the export in `folder` against an independent merge, and warn where rounding changes a token.

    A model that memory doesn't hold in float32 is checked on a sample of its weights.

    Args:
        merge: what was written.
        tuned: what it was made from.
        files: the model that the weights were read from.
        folder: the export, not in place yet.

    Raises:
        ExportError: it differs.
    """
    _warn_of_tokens(merge, tuned, folder)
    needed, available = memory_of(merge.model), available_memory()
    if needed > available:
        logger.info(
            "the model in float32 takes %s and %s are available: a sample of the weights is checked, no logits",
            format_bytes(needed),
            format_bytes(available),
        )
        proof = prove_by_sample(merge, folder)
    else:
        proof = prove_whole(merge, tuned, files, folder)
    if proof.num_flips:
        logger.warning(
            "rounding changes the likeliest token at %d of %d positions: --dtype float32 keeps it",
            proof.num_flips,
            proof.num_positions,
        )
    return proof


@torch.inference_mode()
def prove_whole(merge: Merge, tuned: TunedModel, files: ModelRef, folder: Path) -> Proof:
    """Compare every weight, and logits on real prompts; holds the model once in float32.

    Raises:
        ExportError: a weight or a logit differs.
    """
    check_headers(merge, folder)
    prompts = choose_prompts(tuned, folder)
    _check_tokens(prompts, merge)
    reference, tuned_logits = _load_reference(tuned, files, prompts)
    _round(reference, merge)
    merged_logits = compute_logits(reference, prompts)
    written = ModelRef(folder, None, files.trust_remote_code)
    exported = load(written, "auto")
    num_weights, num_inexact = _compare(reference, exported)
    del reference, exported
    gc.collect()  # PEFT's modules refer to each other
    exported = load(written, torch.float32)
    logits = compute_logits(exported, prompts)
    error = float((logits - merged_logits).abs().max())
    # NaN fails too.
    if not error <= _LOGITS_TOLERANCE:
        raise ExportError(
            f"the export isn't the tuned model: its logits differ by {error:.3g} from those of the merge",
            "nothing was put in place",
        )
    return Proof(
        "whole",
        num_weights,
        num_inexact,
        error,
        float((logits - tuned_logits).abs().max()),
        len(logits),
        int((logits.argmax(-1) != tuned_logits.argmax(-1)).sum()),
    )


def _warn_of_tokens(merge: Merge, tuned: TunedModel, folder: Path) -> None:
    """Warn where tokens were added beside an adapter, and their rows weren't saved in it."""
    if tuned.kind != "adapter":
        return
    trusts = tuned.base is not None and tuned.base.trust_remote_code
    tokenizer, rows = load_tokenizer(ModelRef(folder, None, trusts)), _count_rows(merge)
    if has_unknown(tokenizer, rows):
        logger.warning(
            "the tokenizer has %d tokens and the tuned model rows for %d: if tokens were added for the training, save "
            "the adapter again with PEFT's `save_embedding_layers=True`",
            len(tokenizer),
            rows,
        )


def _count_rows(merge: Merge) -> int:
    return merge.changes.vocab_size or count_known_tokens(merge.model)


def _check_tokens(prompts: Sequence[torch.Tensor], merge: Merge) -> None:
    highest, rows = max(int(ids_BT.max()) for ids_BT in prompts), _count_rows(merge)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer beside the model makes token {highest:,} of its texts, and the tuned model's embeddings "
            f"have {rows:,} rows",
            "put the tokenizer that it was trained with into its folder",
        )


def _load_reference(
    tuned: TunedModel, files: ModelRef, prompts: Sequence[torch.Tensor]
) -> tuple[nn.Module, torch.Tensor]:
    """Return the tuned model in float32, merged by PEFT if it is an adapter, and its logits before that."""
    if tuned.kind == "state":
        # In the stored type the base's weights are mapped, not held beside the trained ones.
        model = load(files, "auto")
        weights = read_weights(tuned.folder)
        # Where tokens were added, the embeddings have grown by their rows.
        grow_embeddings(model, count_rows(model, {name: tuple(it.shape) for name, it in weights.items()}, {}))
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
        model = widen(model, files)
        return model, compute_logits(model, prompts)
    if tuned.kind == "adapter":
        return load_merged(tuned.folder, files, prompts)
    model = load(files, torch.float32)
    return model, compute_logits(model, prompts)


def _round(model: nn.Module, merge: Merge) -> None:
    """Round each weight to the type that it was written in."""
    weights = model.state_dict()
    for group in merge.groups:
        dtype = min((merge.tensors[name].dtype for name in group.files), key=lambda dtype: dtype.itemsize)
        for name in group.parameters:
            if dtype.itemsize < 4 and weights[name].is_floating_point():
                weights[name].copy_(weights[name].to(dtype))


def _compare(reference: nn.Module, exported: PreTrainedModel) -> tuple[int, int]:
    """Return how many weights there are, and how many of them are off by a unit of rounding."""
    expected, num_weights, num_inexact = reference.state_dict(), 0, 0
    for name, found in exported.state_dict().items():
        inexact = count_inexact(name, found, expected[name].to(found.dtype))
        if name not in exported.all_tied_weights_keys:  # counted under the name it shares weights with
            num_weights, num_inexact = num_weights + found.numel(), num_inexact + inexact
    return num_weights, num_inexact
