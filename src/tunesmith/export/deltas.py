"""What a LoRA adapter adds to each parameter, computed from its files without PEFT.

Linear:     scale · B A                 A: rank × in, B: out × rank
Conv1D:     scale · (B A)ᵀ              its weight is stored in × out
Embedding:  scale · (B A)ᵀ              A: rank × vocabulary, B: width × rank
Experts:    scale · B_e A_e for each    A: (experts · rank) × in, B: out × (rank · experts)

scale is alpha / rank, or alpha / √rank for rsLoRA. The sums run in the order of PEFT's own
(peft.tuners.lora.layer, `get_delta_weight`), so that mostly not even the last bit differs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError
from tunesmith.export.source import PickledFile, find_adapter_weights
from tunesmith.export.tensors import TensorFile
from tunesmith.model.fit import check_state_fits
from tunesmith.runs.base_model import read_adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<nesting>(\.base_layer)*)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?"
)
# Features of LoRA whose sum is another one than ours; the value that leaves them off.
_UNSUPPORTED = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "use_qalora": False,
    "ensure_weight_tying": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "megatron_config": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "kasa_config": None,
}
# These change the base weights when training begins, so that the adapter doesn't fit the base as published.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True)
class Factors:
    """The two matrices of a parameter's delta, by their names in the adapter's file.

    `num_experts` is None for a plain matrix. `transposed`: the parameter is stored in × out.
    """

    a: str
    b: str
    scale: float
    transposed: bool = False
    num_experts: int | None = None


class AdapterChanges:
    """Those of a LoRA adapter. `factors`: what each parameter's delta is made of.

    Raises:
        ModelError: it isn't a plain LoRA adapter, or wasn't made from this model.
    """

    keeps_ties = False

    def __init__(self, folder: Path, model: PreTrainedModel, base: str) -> None:
        self.settings = read_adapter_config(folder)
        _refuse_unsupported(folder, self.settings)
        self._file = _open_adapter(folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in self._file.tensors.items()}
        self.factors: dict[str, Factors] = {}
        self._whole: dict[str, str] = {}
        for name in shapes:
            self._add(name, model)
        deltas = {parameter: self._shape_of(factors) for parameter, factors in self.factors.items()}
        whole = {parameter: shapes[name] for parameter, name in self._whole.items()}
        check_state_fits(model, {**deltas, **whole}, base, "adapter")
        self.added = frozenset(self.factors) - frozenset(self._whole)
        self.replaced = frozenset(self._whole)

    def read(self, parameter: str) -> torch.Tensor:
        whole = self._file.read(self._whole[parameter]).float() if parameter in self._whole else None
        if parameter not in self.factors:
            assert whole is not None
            return whole
        delta = self._delta(self.factors[parameter])
        return delta if whole is None else whole + delta

    def read_factors(self, parameter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B of a parameter's delta, as stored."""
        factors = self.factors[parameter]
        return self._file.read(factors.a), self._file.read(factors.b)

    def _delta(self, factors: Factors) -> torch.Tensor:
        a, b = self._file.read(factors.a).float(), self._file.read(factors.b).float()
        if factors.num_experts is None:
            product = b @ a
        else:
            a = a.reshape(factors.num_experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, factors.num_experts)
            product = torch.einsum("ore,eri->eoi", b, a)
        product *= factors.scale
        return product.transpose(-1, -2) if factors.transposed else product

    def _shape_of(self, factors: Factors) -> tuple[int, ...]:
        out, into = self._file.tensors[factors.b].shape[0], self._file.tensors[factors.a].shape[1]
        matrix = (into, out) if factors.transposed else (out, into)
        return matrix if factors.num_experts is None else (factors.num_experts, *matrix)

    def _add(self, name: str, model: PreTrainedModel) -> None:
        """Take in a tensor of the adapter's file: an A with its B, or a whole parameter."""
        match = _FACTOR.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            parameter = name.removeprefix(_PREFIX).replace(".base_layer", "")
            if parameter not in model.state_dict():
                raise _unsupported(f"the tensor `{name}`")
            self._whole[parameter] = name
        elif match["factor"] == "A":
            b = re.sub(r"(.*lora_(embedding_)?)A", r"\1B", name)
            if b not in self._file.tensors:
                raise ModelError(f"the adapter holds `{name}` without `{b}`", "get the adapter again")
            parameter, form = self._form(model, match["module"], match["nesting"].count("."))
            rank = self._file.tensors[name].shape[0] // (form.get("num_experts") or 1)
            self.factors[parameter] = Factors(name, b, self._scale(parameter, rank), **form)

    def _form(self, model: PreTrainedModel, path: str, nesting: int) -> tuple[str, dict[str, Any]]:
        """Return the parameter that a module's adapter changes, and what `Factors` says of its form."""
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return f"{path}.weight", {}  # of another model: the check of all shapes says so
        adapted = [
            parameter
            for parameter, _ in module.named_parameters(recurse=False)
            for target in self.settings.get("target_parameters") or ()
            if f"{path}.{parameter}" == target or f"{path}.{parameter}".endswith(f".{target}")
        ]
        if adapted:
            if nesting >= len(adapted):
                raise _unsupported(f"`{path}` with more adapters than `target_parameters`")
            # PEFT wraps a module once for each parameter; the last one is outside.
            parameter = adapted[-1 - nesting]
            tensor = module.get_parameter(parameter)
            if tensor.dim() == 2:
                return f"{path}.{parameter}", {}
            stored_in_out = bool(getattr(module, "is_transposed", False))
            return f"{path}.{parameter}", {"transposed": stored_in_out, "num_experts": tensor.shape[0]}
        if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            raise _unsupported(f"the adapted layer `{path}`, a {type(module).__name__},")
        return f"{path}.weight", {"transposed": not isinstance(module, nn.Linear)}

    def _scale(self, parameter: str, rank: int) -> float:
        patterns: Mapping[str, float] = self.settings.get("alpha_pattern") or {}
        names = (parameter, parameter.rpartition(".")[0])
        alphas = (
            alpha
            for pattern, alpha in patterns.items()
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
        )
        alpha = next(alphas, self.settings["lora_alpha"])
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank


class _AdapterFile(Protocol):
    tensors: dict[str, torch.Tensor]

    def read(self, name: str) -> torch.Tensor: ...


def _open_adapter(folder: Path) -> _AdapterFile:
    path = find_adapter_weights(folder)
    return PickledFile(path) if path.suffix == ".bin" else TensorFile(path)


def _refuse_unsupported(folder: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise _unsupported(f"`{folder}`, a {kind} adapter,")
    for name, off in _UNSUPPORTED.items():
        if (settings.get(name) or off) != off:
            raise _unsupported(f"an adapter with `{name}`")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise _unsupported(f"an adapter that began with `init_lora_weights` {start}")


def _unsupported(what: str) -> ModelError:
    return ModelError(
        f"{what} can't be merged: known are LoRA and rsLoRA on linear, embedding and fused expert weights",
        "export the adapter by itself with --no_merge",
    )
