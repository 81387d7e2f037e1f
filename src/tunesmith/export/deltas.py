"""What a LoRA adapter makes of each parameter, computed from its files without PEFT.

Linear:     scale · B A                 A: rank × in, B: out × rank
Conv1D:     scale · (B A)ᵀ              its weight is stored in × out
Embedding:  scale · (B A)ᵀ              A: rank × vocabulary, B: width × rank
Experts:    scale · B_e A_e for each    A: (experts · rank) × in, B: out × (rank · experts)
DoRA:       m / ‖W + Δ‖ · (W + Δ)       m and the norms: one for each output, of an embedding for each column

scale is alpha / rank, or alpha / √rank for rsLoRA. The sums run in the order of PEFT's own
(peft.tuners.lora.layer, `get_delta_weight`), so that mostly not even the last bit differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from tunesmith.export.adapter_parts import Factors, Part, read_parts
from tunesmith.model.adapters.folder import Shape, count_rows, find_adapter_weights
from tunesmith.model.files.tensor_files import TensorFile
from tunesmith.model.files.weight_source import PickledFile
from tunesmith.model.fit import check_rows, check_state_fits, shapes_under
from tunesmith.runs.base_model import read_adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AdapterChanges:
    """Those of a LoRA adapter. `parts`: what it does to each parameter.

    Raises:
        ForeignAdapterError: only PEFT can merge it.
        ModelError: it wasn't made from this model.
    """

    def __init__(
        self, folder: Path, model: PreTrainedModel, base: str, in_files: Mapping[str, torch.Tensor]
    ) -> None:
        settings = read_adapter_config(folder)
        self._file = open_adapter_file(folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in self._file.tensors.items()}
        parts = read_parts(model, settings, shapes, in_files)
        self.parts, self._in_files = parts.parameters, parts.files
        self.files = frozenset(parts.files)
        single = {name: self._shape_of(factors) for name, factors in parts.files.items()}
        check_state_fits(model, single, base, "adapter", {n: tuple(in_files[n].shape) for n in single})
        under = shapes_under(model, shapes, settings)
        found = {name: self._shape_of(part.factors) for name, part in self.parts.items() if part.factors}
        found |= {name: shapes[part.whole] for name, part in self.parts.items() if part.whole}
        check_state_fits(model, found, base, "adapter", {**_shapes_of(model), **under})
        check_rows(model, shapes, settings)
        self.keeps_ties = self._settle_ties(model.all_tied_weights_keys)
        before = _shapes_of(model)
        self.shapes: Mapping[str, Shape] = {
            name: shape for name, shape in under.items() if shape != before[name]
        }
        for name in self.shapes:
            if not (self.keeps_ties and name in model.all_tied_weights_keys):
                self.parts.setdefault(name, Part())  # cut to its new rows
        self.vocab_size = count_rows(model, shapes, settings) if self.shapes else None
        self.remade = frozenset(
            name
            for name, part in self.parts.items()
            if not part.is_sum or (part.whole is None and name in self.shapes)
        )
        self.replaced = frozenset(name for name, part in self.parts.items() if part.whole) - self.remade
        self.added = frozenset(self.parts) - self.remade - self.replaced

    def read(self, parameter: str) -> torch.Tensor:
        part = self.parts[parameter]
        result = self._file.read(part.whole).float() if part.whole else None
        for delta in self._deltas(part, torch.float32):
            result = delta if result is None else result + delta
        assert result is not None
        return result

    def read_file(self, name: str) -> torch.Tensor:
        return self._delta(self._in_files[name], torch.float32)

    def remake(self, parameter: str, base: torch.Tensor) -> torch.Tensor:
        part = self.parts[parameter]
        rows = self.shapes.get(parameter, base.shape)[0]
        weight = self._file.read(part.whole).to(base.dtype) if part.whole else base[:rows]
        if part.init is not None:
            assert part.factors is not None
            rank = self._file.tensors[part.factors.a].shape[0]
            weight = weight - _beginning(part.init, weight, rank, part.factors)
        for delta in self._deltas(part, base.dtype):
            weight = weight + delta
        if part.magnitude is not None:
            weight = self._scale_to(self._file.read(part.magnitude).to(base.dtype), part, weight)
        if part.tokens is not None:
            name, tokens = part.tokens
            grown = weight.new_empty(rows, *weight.shape[1:])
            grown[: len(weight)] = weight
            weight = grown.index_copy_(0, torch.tensor(tokens), self._file.read(name).to(base.dtype))
        return weight

    def read_factors(self, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B, as stored."""
        return self._file.read(factors.a), self._file.read(factors.b)

    def _deltas(self, part: Part, dtype: torch.dtype) -> list[torch.Tensor]:
        deltas = []
        if part.factors is not None:
            deltas.append(self._delta(part.factors, dtype))
        if part.bias is not None:
            name, scale = part.bias
            deltas.append(self._file.read(name).to(dtype) * scale)
        return deltas

    def _delta(self, factors: Factors, dtype: torch.dtype) -> torch.Tensor:
        a, b = (tensor.to(dtype) for tensor in self.read_factors(factors))
        if factors.num_experts is None:
            product = b @ a
        else:
            a = a.reshape(factors.num_experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, factors.num_experts)
            product = torch.einsum("ore,eri->eoi", b, a)
        product *= factors.scale
        return product.transpose(-1, -2) if factors.transposed else product

    @staticmethod
    def _scale_to(magnitude: torch.Tensor, part: Part, weight: torch.Tensor) -> torch.Tensor:
        assert part.factors is not None
        dim = 0 if part.factors.transposed else 1
        factor: torch.Tensor = magnitude.flatten() / torch.linalg.norm(weight, dim=dim)
        return factor.unsqueeze(dim) * weight

    def _shape_of(self, factors: Factors) -> tuple[int, ...]:
        out, into = self._file.tensors[factors.b].shape[0], self._file.tensors[factors.a].shape[1]
        matrix = (into, out) if factors.transposed else (out, into)
        return matrix if factors.num_experts is None else (factors.num_experts, *matrix)

    def _settle_ties(self, tied_keys: dict[str, str]) -> bool:
        """Give each of several parameters that share weights what it is to be; return whether they go on sharing.

        PEFT changes one of them alone, or both alike: its file may hold either once, or each.
        """
        together = True
        for target, source in tied_keys.items():
            parts = {name: self.parts.get(name, Part()) for name in (source, target)}
            if not any(part != Part() for part in parts.values()):
                continue
            first, other = parts[source], parts[target]
            if other == Part() and first.tokens is not None:  # PEFT ties rows of tokens by itself
                other = first
            # What either was before the training, both were.
            first, other = (
                replace(part, whole=before)
                if part.whole is None and ".base_layer." in (before or "")
                else part
                for part, before in ((first, other.whole), (other, first.whole))
            )
            if self._are_same(first, other):
                self.parts[source] = first
                self.parts.pop(target, None)
                continue
            together = False
            self.parts.update({source: first, target: other})
        return together

    def _are_same(self, one: Part, other: Part) -> bool:
        """Return whether two parameters of equal weights, embeddings and head, are changed alike."""
        if one == other:
            return True
        plain = {"whole": None, "factors": None, "tokens": None}
        if replace(one, **plain) != replace(other, **plain) or one.magnitude or one.init:
            return False
        if (one.tokens and one.tokens[1]) != (other.tokens and other.tokens[1]):
            return False
        pairs = [(one.whole, other.whole)]
        pairs += [(one.tokens[0], other.tokens[0])] if one.tokens and other.tokens else []
        if any(not self._are_equal(*pair) for pair in pairs):
            return False
        if one.factors is None or other.factors is None:
            return one.factors is other.factors
        a, b = self.read_factors(one.factors)
        other_a, other_b = self.read_factors(other.factors)
        if one.factors.transposed != other.factors.transposed:
            other_a, other_b = other_b.T, other_a.T
        alike = one.factors.scale == other.factors.scale
        return alike and torch.equal(a, other_a) and torch.equal(b, other_b)

    def _are_equal(self, one: str | None, other: str | None) -> bool:
        if one is None or other is None:
            return one is other
        return torch.equal(self._file.read(one), self._file.read(other))


def _beginning(init: str, weight: torch.Tensor, rank: int, factors: Factors) -> torch.Tensor:
    """Return what PEFT takes off a base weight as it puts an adapter on it: the product that training began with.

    Source: peft.tuners.lora.layer, `pissa_init` and `olora_init`, in float32 as they are.
    """
    matrix = (weight.T if factors.transposed else weight).float()
    scale = factors.scale
    if init == "pissa":
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        root = torch.diag(torch.sqrt(values[:rank] / scale))
        b, a = left[:, :rank] @ root, root @ right[:rank]
    else:
        left, right = torch.linalg.qr(matrix)
        b, a = left[:, :rank], right[:rank]
    product: torch.Tensor = scale * b @ a
    return (product.T if factors.transposed else product).to(weight.dtype)


def _shapes_of(model: PreTrainedModel) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class _AdapterFile(Protocol):
    tensors: dict[str, torch.Tensor]

    def read(self, name: str) -> torch.Tensor: ...


def open_adapter_file(folder: Path) -> _AdapterFile:
    """Open the weights of the adapter in `folder`, for reading tensor by tensor.

    Raises:
        ModelError: there are none, or they are torn.
    """
    path = find_adapter_weights(folder)
    return PickledFile(path) if path.suffix == ".bin" else TensorFile(path)
