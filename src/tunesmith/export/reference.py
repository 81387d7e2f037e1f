"""A tuned model merged by PEFT, whole in memory: what a merge is held against, and what merges the rarer kinds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunesmith.compat import compute_buffers
from tunesmith.config import ModelRef
from tunesmith.errors import ModelError, ResourceError
from tunesmith.export.changes import WholeTensors
from tunesmith.export.proof import check_close
from tunesmith.machine import available_memory
from tunesmith.model.adapters.lora import apply_adapter
from tunesmith.view.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits are kept for the last tokens of a text: three times their number times the vocabulary.
_KEPT_POSITIONS = 64
_MEMORY_FACTOR = 1.2
_AS_IT_IS = (
    "export it by itself with --no_merge; `tunesmith evaluate --engine transformers` takes it as it is"
)
_NUM_TRIAL_TOKENS = 16


class MergedByPeft(WholeTensors):
    """The changes of an adapter of any kind that PEFT can merge: all weights, in float32.

    Raises:
        ModelError: PEFT can't merge it, or it doesn't fit the model.
        ResourceError: the memory doesn't hold the model.
    """

    added: frozenset[str] = frozenset()
    remade: frozenset[str] = frozenset()

    def __init__(self, folder: Path, model: PreTrainedModel, files: ModelRef) -> None:
        needed, available = memory_of(model), available_memory()
        if needed > available:
            raise ResourceError(
                f"only PEFT can merge the adapter `{folder}`, with the whole model in float32, which takes "
                f"{format_bytes(needed)}, and {format_bytes(available)} are available",
                "convert on a machine with more memory, or export the adapter by itself with --no_merge",
            )
        ids = torch.randint(
            model.config.get_text_config().vocab_size, (1, _NUM_TRIAL_TOKENS), generator=_seeded()
        )
        merged, _ = load_merged(folder, files, [ids])
        self._weights: dict[str, torch.Tensor] = {
            name: tensor.detach() for name, tensor in merged.state_dict().items()
        }
        before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if extra := sorted(self._weights.keys() - before.keys()):
            raise ModelError(
                f"the adapter `{folder}` makes a model of other parts than its base's: `{extra[0]}` is a new one",
                _AS_IT_IS,
            )
        tied = [pair for pair in model.all_tied_weights_keys.items() if self._weights.keys() >= {*pair}]
        self.keeps_ties = all(torch.equal(self._weights[one], self._weights[other]) for one, other in tied)
        if self.keeps_ties:
            for target, _ in tied:
                del self._weights[target]
        self.replaced = frozenset(self._weights) & frozenset(before)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(self._weights[name].shape)
            for name in self.replaced
            if tuple(self._weights[name].shape) != before[name]
        }
        self.vocab_size = merged.get_input_embeddings().weight.shape[0] if self.shapes else None

    def read(self, parameter: str) -> torch.Tensor:
        return self._weights[parameter].float()

    def remake(self, parameter: str, base: torch.Tensor) -> torch.Tensor:
        raise KeyError(parameter)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def memory_of(model: PreTrainedModel) -> int:
    """Return the bytes that working with a model in float32 takes."""
    return int(_MEMORY_FACTOR * 4 * sum(weights.numel() for weights in model.parameters()))


def load_merged(
    folder: Path, files: ModelRef, prompts: Sequence[torch.Tensor]
) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return base and adapter in float32, merged by PEFT, and their logits on the prompts before that.

    Raises:
        ModelError: PEFT can't merge it, or it doesn't fit the model.
        ExportError: PEFT's merge isn't the model and its adapter.
    """
    adapted = apply_adapter(load(files, torch.float32), folder)
    before = compute_logits(adapted, prompts)
    merged = _merge(adapted, folder)
    check_close("what PEFT merges", compute_logits(merged, prompts), before)
    return merged, before


def _merge(adapted: Any, folder: Path) -> PreTrainedModel:
    """Return the model with its adapter merged into its weights, as PEFT does it; `folder` is the adapter's.

    Weights that the model shares are apart afterwards: an adapter may have changed one of them alone.

    Raises:
        ModelError: PEFT can't merge an adapter of this kind.
    """
    if adapted.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"the adapter `{folder}` can't be merged: it stands before the prompt and changes no weights",
            _AS_IT_IS,
        )
    _untie(adapted)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no longer tied after merging.*")
            merged: PreTrainedModel = adapted.merge_and_unload()
    except (AttributeError, ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"PEFT can't merge the adapter `{folder}`: {reason}", _AS_IT_IS) from error
    merged.config.get_text_config().tie_word_embeddings = False
    return merged.eval()


def _untie(model: nn.Module) -> None:
    """Give every parameter that is found in a second place a copy of its own there."""
    seen = set()
    for module in list(model.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


def widen(model: PreTrainedModel, ref: ModelRef) -> PreTrainedModel:
    """Return `model`, loaded from `ref` in its stored type, in float32, as if it had been loaded so.

    A cast would keep what the stored type has rounded of the buffers that no file holds, as Gemma's scale.
    """
    wide = load(ref, torch.float32, device_map="meta")
    compute_buffers(wide)
    model = model.float()
    for name, buffer in wide.named_buffers():
        if not buffer.is_meta:
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, buffer)
    return model


def load(ref: ModelRef, dtype: torch.dtype | str, device_map: str | None = None) -> PreTrainedModel:
    """Return a model whose files lie in place, as transformers loads it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        ref.source,
        dtype=dtype,
        revision=ref.revision or "main",
        trust_remote_code=ref.trust_remote_code,
        device_map=device_map,
    )
    return model.eval()


@torch.inference_mode()
def compute_logits(model: nn.Module, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the logits [positions, vocabulary] after the last tokens of each prompt."""
    rows = [model(input_ids=ids_BT, use_cache=False).logits[0, -_KEPT_POSITIONS:] for ids_BT in prompts]
    return torch.cat(rows).float()
