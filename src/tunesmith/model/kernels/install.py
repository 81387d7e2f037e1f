"""Which of our computations a model takes, by the device that it runs on, and the one place that installs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.kernels.dropout import install_dropout
from tunesmith.model.kernels.elementwise import fuse_elementwise
from tunesmith.model.kernels.lora_linear import fuse_adapters
from tunesmith.model.kernels.loss import CPU_LOGITS, GPU_LOGITS, LogitsAtATime
from tunesmith.model.kernels.recompute import CheapResults
from tunesmith.model.kernels.token_rows import install_token_rows


@dataclass(frozen=True)
class Kernels:
    """How a model computes what is ours.

    Attributes:
        attention: transformers' name of the function that attends within examples; a dry run has one of its own.
        logits: how many of them the fused loss holds at a time; a loss that isn't told goes by its device.
        keeps_cheap_results: whether what is cheaper to compute twice than to keep is kept all the same.
        packs_masks: whether those masks of dropout that are kept are so as bits, else as bools.
        torch_norms: whether norms are torch's own.
        fuses_adapters: whether adapted layers are computed with their adapters at once.
        groups_adapters: whether adapted layers that share an input are computed together, with one dropout.
        adapters_first: whether a layer's weight is multiplied into what its adapter gives, and not the other way: a pass
            less over the results, that products which keep a device busy hide.
        fuses_elementwise: whether norms and gated layers are computed in fewer passes.
    """

    attention: str
    logits: LogitsAtATime
    keeps_cheap_results: bool
    packs_masks: bool
    torch_norms: bool
    fuses_adapters: bool = True
    groups_adapters: bool = True
    adapters_first: bool = False
    fuses_elementwise: bool = True


CPU = Kernels(VARLEN, CPU_LOGITS, keeps_cheap_results=False, packs_masks=True, torch_norms=False)

# Its products leave less time for anything else; what computing again costs there is not measured, but an 8B model
# keeps 25 GB of a row of 8,192 tokens for it, not 37.
GPU = Kernels(
    VARLEN, GPU_LOGITS, keeps_cheap_results=False, packs_masks=False, torch_norms=True, adapters_first=True
)


def kernels_for(device_type: str) -> Kernels:
    """Return how models compute on devices of this type."""
    return CPU if device_type == "cpu" else GPU


def install_kernels(model: nn.Module, kernels: Kernels, shared_inputs: Iterable[Sequence[str]] = ()) -> None:
    """Let the layers of `model` compute as `kernels` says, in place of what they were told before.

    `shared_inputs` are the names of adapted layers that are handed the same tensor (`find_shared_inputs`). Attention is the model's own until a probe has shown that ours is right.
    """
    results = CheapResults(kernels.keeps_cheap_results)
    if kernels.fuses_adapters:
        groups = shared_inputs if kernels.groups_adapters else ()
        fuse_adapters(model, results, kernels.packs_masks, groups, kernels.adapters_first)
    if kernels.fuses_elementwise:
        fuse_elementwise(model, results, kernels.torch_norms)
    install_token_rows(model)
    install_dropout(model)
