"""What a tuning did to the base model's parameters: added something to them, or replaced them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from tunesmith.model.fit import check_state_fits
from tunesmith.model.state import list_weights, read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Changes(Protocol):
    """Names are the model's parameters, not those of its files."""

    added: frozenset[str]
    replaced: frozenset[str]
    keeps_ties: bool
    """A change of one parameter is a change of all that share its weights."""

    def read(self, parameter: str) -> torch.Tensor:
        """Return in float32 what is added to the parameter, or what replaces it."""
        ...


class NoChanges:
    """Those of a model that is whole already."""

    added: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()
    keeps_ties = True

    def read(self, parameter: str) -> torch.Tensor:
        raise KeyError(parameter)


class StateChanges:
    """Those of a full fine-tuning: every trained weight, from a checkpoint's sharded state.

    Raises:
        ModelError: the weights are not those of `model`.
        CheckpointError: the state is absent or torn.
    """

    added: frozenset[str] = frozenset()
    keeps_ties = True

    def __init__(self, folder: Path, model: PreTrainedModel, base: str) -> None:
        listed = list_weights(folder)
        check_state_fits(model, {name: tuple(tensor.shape) for name, tensor in listed.items()}, base)
        self.replaced = frozenset(listed)
        self._folder = folder

    def read(self, parameter: str) -> torch.Tensor:
        return read_weights(self._folder, [parameter])[parameter].float()
