"""What a tuning did to the base model's parameters: added something to them, replaced or remade them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from tunesmith.model.adapters.folder import count_rows
from tunesmith.model.files.state import list_weights, read_weights
from tunesmith.model.fit import check_state_fits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Changes(Protocol):
    """Names are the model's parameters, not those of its files."""

    added: frozenset[str]
    replaced: frozenset[str]
    remade: frozenset[str]
    """These follow from the base's own weights and the tuning's."""
    files: frozenset[str]
    """Tensors of the base's files that something is added to: parts of a parameter."""
    keeps_ties: bool
    """A change of one parameter is a change of all that share its weights."""
    shapes: Mapping[str, tuple[int, ...]]
    """Those of parameters that have others than the base's."""
    vocab_size: int | None
    """Of the tuned model, where the tuning changed it."""

    def read(self, parameter: str) -> torch.Tensor:
        """Return in float32 what is added to the parameter, or what replaces it."""
        ...

    def read_file(self, name: str) -> torch.Tensor:
        """Return in float32 what is added to a tensor of the base's files."""
        ...

    def remake(self, parameter: str, base: torch.Tensor) -> torch.Tensor:
        """Return what becomes of the base's parameter, in the type of that."""
        ...


def apply_changes(changes: Changes, parameter: str, base: torch.Tensor) -> torch.Tensor:
    """Return what becomes of the base's parameter, in the type of that: float32, or wider."""
    if parameter in changes.remade:
        return changes.remake(parameter, base)
    if parameter in changes.replaced:
        return changes.read(parameter).to(base.dtype)
    return base + changes.read(parameter) if parameter in changes.added else base


def list_changed(changes: Changes) -> frozenset[str]:
    """Return the names of all parameters that the tuning changed."""
    return changes.added | changes.replaced | changes.remade


class WholeTensors:
    """Nothing is added to what is a part of a parameter in the base's files."""

    files: frozenset[str] = frozenset()

    def read_file(self, name: str) -> torch.Tensor:
        raise KeyError(name)


class _SameShapes(WholeTensors):
    """Nothing is remade, and nothing has another shape than the base's."""

    remade: frozenset[str] = frozenset()
    shapes: Mapping[str, tuple[int, ...]] = {}
    vocab_size: int | None = None

    def remake(self, parameter: str, base: torch.Tensor) -> torch.Tensor:
        raise KeyError(parameter)


class NoChanges(_SameShapes):
    """Those of a model that is whole already."""

    added: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()
    keeps_ties = True

    def read(self, parameter: str) -> torch.Tensor:
        raise KeyError(parameter)


class StateChanges(_SameShapes):
    """Those of a full fine-tuning: every trained weight, from a checkpoint's sharded state.

    Raises:
        ModelError: the weights are not those of `model`.
        CheckpointError: the state is absent or torn.
    """

    added: frozenset[str] = frozenset()
    keeps_ties = True

    def __init__(self, folder: Path, model: PreTrainedModel, base: str) -> None:
        found = {name: tuple(tensor.shape) for name, tensor in list_weights(folder).items()}
        check_state_fits(model, found, base)
        self.replaced = frozenset(found)
        own = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.shapes = {name: shape for name, shape in found.items() if shape != own[name]}
        self.vocab_size = count_rows(model, found, {}) if self.shapes else None
        self._folder = folder

    def read(self, parameter: str) -> torch.Tensor:
        return read_weights(self._folder, [parameter])[parameter].float()
