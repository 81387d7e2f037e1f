"""An adapter as its files hold it, and two of them on the same base as one.

What a LoRA adds is a product of two thin matrices, so that the sum of two such products is one again: their ranks add up.

Shapes: R rank, D inputs, O outputs, E experts, N tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.runs.base_model import read_adapter_config

PREFIX = "base_model.model."
_A = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?A(\.weight)?")
_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class AdapterFile:
    """`settings` are those of `adapter_config.json`, `tensors` those of `adapter_model.safetensors`, by name."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]


class _Pair(NamedTuple):
    """The matrices (R, D) and (O, R) of a module's adapter, which already holds its scale; for experts, of each."""

    a: Tensor
    b: Tensor
    num_experts: int | None

    @property
    def rank(self) -> int:
        return self.a.shape[0] // (self.num_experts or 1)


def read_adapter_file(folder: Path) -> AdapterFile:
    """Return the adapter that lies in `folder`.

    Raises:
        ModelError: it is torn.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    try:
        if path.is_file():
            return AdapterFile(read_adapter_config(folder), load_file(path))
        path = folder / "adapter_model.bin"
        return AdapterFile(read_adapter_config(folder), torch.load(path, "cpu", weights_only=True))
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ModelError(f"`{path}` can't be read: {error}", "get the adapter again") from error


def name_in_file(parameter: str, adapter: str) -> str:
    """Return what PEFT's files call a parameter of the adapter called `adapter`, which a model calls `parameter`.

    PEFT's own function asks the modules themselves, which resets the weights of sharded ones in the middle of a step.
    """
    name = parameter.replace(f".modules_to_save.{adapter}.", ".")
    name = name.replace(f".lora_magnitude_vector.{adapter}.weight", ".lora_magnitude_vector")
    return re.sub(rf"\.(lora_\w+|trainable_tokens_delta)\.{adapter}(?=\.|$)", r".\1", name)


def stack_adapters(upper: AdapterFile, lower: AdapterFile) -> AdapterFile:
    """Return one adapter that changes a base model as `lower` and, on top of it, `upper` do; both are plain LoRA.

    What `upper` replaces whole, modules or rows of tokens, it has as they are: they were begun from what `lower` made.
    """
    uppers, lowers = _pairs_of(upper), _pairs_of(lower)
    lowers = {key: pair for key, pair in lowers.items() if f"{key[0]}.weight" not in upper.tensors}
    found = {key: [pairs[key] for pairs in (uppers, lowers) if key in pairs] for key in {**uppers, **lowers}}
    rank = max((sum(pair.rank for pair in pairs) for pairs in found.values()), default=1)
    tensors = {name: it for name, it in upper.tensors.items() if ".lora_" not in name and _ROWS not in name}
    for (module, form), pairs in found.items():
        a, b = _stack_pairs(pairs, rank)
        weight = "" if form == "embedding_" else ".weight"
        tensors[f"{module}.lora_{form}A{weight}"], tensors[f"{module}.lora_{form}B{weight}"] = a, b
    indices = _stack_rows(upper, lower, tensors)
    settings = {
        **upper.settings,
        # The scales lie in the matrices.
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "target_modules": _join_targets(upper, lower, tensors),
        "target_parameters": _union(it.settings.get("target_parameters") for it in (upper, lower)) or None,
        "trainable_token_indices": indices or None,
    }
    return AdapterFile(settings, tensors)


def token_rows_of(file: AdapterFile) -> dict[str, tuple[list[int], Tensor]]:
    """Return the tokens that an adapter has rows of its own for, by the module's full name: their ids, and rows (N, D)."""
    indices = file.settings.get("trainable_token_indices") or {}
    found = {}
    for name, rows in file.tensors.items():
        if name.endswith(_ROWS):
            module = name.removesuffix(_ROWS)
            ids = indices
            if isinstance(indices, dict):
                ids = next(ids for short, ids in indices.items() if module.endswith(short))
            found[module.removeprefix(PREFIX)] = ([*ids], rows)
    return found


def _pairs_of(file: AdapterFile) -> dict[tuple[str, str], _Pair]:
    pairs = {}
    for name, a in file.tensors.items():
        match = _A.fullmatch(name)
        if match is None:
            continue
        module, form = match["module"], match["embedding"] or ""
        b = file.tensors[re.sub(r"(.*\.lora_(embedding_)?)A", r"\1B", name)]
        fuses = bool(file.settings.get("target_parameters")) and re.search(
            r"\.experts(\.base_layer)*$", module
        )
        num_experts = a.shape[0] // file.settings["r"] if fuses else None
        scale = _scale_of(file.settings, module.removeprefix(PREFIX), a.shape[0] // (num_experts or 1))
        pairs[module, form] = _Pair(a.float(), b.float() * scale, num_experts)
    return pairs


def _scale_of(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Return what a module's product is multiplied by (peft.tuners.lora.layer, `update_layer`)."""
    patterns: Mapping[str, float] = settings.get("alpha_pattern") or {}
    alphas = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = next(alphas, settings["lora_alpha"])
    return float(alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank)


def _stack_pairs(pairs: list[_Pair], rank: int) -> tuple[Tensor, Tensor]:
    """Return the matrices of the sum, with zeros up to `rank`."""
    num_experts = pairs[0].num_experts
    if num_experts is None:
        width = max(pair.a.shape[1] for pair in pairs)  # embeddings may have grown in between
        a_RD = torch.cat([F.pad(pair.a, (0, width - pair.a.shape[1])) for pair in pairs])
        b_OR = torch.cat([pair.b for pair in pairs], 1)
        missing = rank - len(a_RD)
        return F.pad(a_RD, (0, 0, 0, missing)), F.pad(b_OR, (0, missing))
    # PEFT's order: of A's rows the expert comes first, of B's columns it comes last.
    a_ERD = torch.cat([pair.a.view(num_experts, pair.rank, -1) for pair in pairs], 1)
    b_ORE = torch.cat([pair.b.view(len(pair.b), pair.rank, num_experts) for pair in pairs], 1)
    missing = rank - a_ERD.shape[1]
    return F.pad(a_ERD, (0, 0, 0, missing)).flatten(0, 1), F.pad(b_ORE, (0, 0, 0, missing)).flatten(1)


def _stack_rows(upper: AdapterFile, lower: AdapterFile, tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """Put the rows of both into `tensors`; return the tokens that they are of, by module."""
    uppers, lowers = token_rows_of(upper), token_rows_of(lower)
    indices = {}
    for module in {**lowers, **uppers}:
        if f"{PREFIX}{module}.weight" in tensors:
            continue
        ids, rows = uppers.get(module, ([], None))
        below, rows_below = lowers.get(module, ([], None))
        kept = [place for place, token in enumerate(below) if token not in ids]
        parts = [rows_below[kept].float()] if rows_below is not None else []
        parts += [rows.float()] if rows is not None else []
        tensors[f"{PREFIX}{module}{_ROWS}"] = torch.cat(parts)
        indices[module.rsplit(".", 1)[-1]] = [*(below[place] for place in kept), *ids]
    return indices


def _join_targets(upper: AdapterFile, lower: AdapterFile, tensors: Iterable[str]) -> list[str]:
    """Return names of just the modules that both adapt."""
    narrowed = any(
        isinstance(it.settings.get("target_modules"), str) or it.settings.get(name)
        for it in (upper, lower)
        for name in ("layers_to_transform", "exclude_modules")
    )
    if not narrowed:
        return _union(it.settings.get("target_modules") for it in (upper, lower))
    modules = {match["module"].removeprefix(PREFIX) for name in tensors if (match := _A.fullmatch(name))}
    return sorted(module for module in modules if not re.search(r"\.experts(\.base_layer)*$", module))


def _union(lists: Iterable[Iterable[str] | None]) -> list[str]:
    return sorted({it for names in lists for it in names or ()})
