"""The exported weights, one tensor at a time: the base model's, changed as the tuning changed them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.config import ModelRef
from tunesmith.errors import ExportError, ModelError
from tunesmith.export.adapter_parts import ForeignAdapterError
from tunesmith.export.changes import Changes, NoChanges, StateChanges, apply_changes, list_changed
from tunesmith.export.deltas import AdapterChanges
from tunesmith.export.reference import MergedByPeft
from tunesmith.model.adapters.folder import check_repeatable
from tunesmith.model.files.weight_names import Group, NameMap
from tunesmith.model.files.weight_source import WeightSource, open_source
from tunesmith.model.load import build_meta_model, load_model_config
from tunesmith.runs.tuned import TunedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)


class Merge:
    """A tuned model's weights under the names that its base model's files use.

    `tensors`: shape and dtype of what is to be written, on the meta device, in the order of writing.
    `unties`: the tuning changed one of several parameters that share weights, so each is written.

    Raises:
        ModelError: a changed parameter can't be found in the files.
    """

    def __init__(
        self, source: WeightSource, model: PreTrainedModel, changes: Changes, dtype: torch.dtype | None
    ) -> None:
        self.source, self.model, self.changes = source, model, changes
        self.names = NameMap(model, source.tensors)
        self._ties = _find_ties(model)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._changed = list_changed(changes)
        self.unties = not changes.keeps_ties and not self._ties.keys().isdisjoint(self._changed)
        self._stored = {name: name for name in source.tensors}
        self.groups = self.names.groups + (self._untied_groups() if self.unties else [])
        self._group_of = {name: group for group in self.groups for name in group.files}
        self._check()
        self.tensors = {
            name: cast_weights(self._resized(group, source.tensors[self._stored[name]]), dtype)
            for group in self.groups
            for name in group.files
        }
        self._pending: dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as it is to be written: summed in float32, rounded once.

        What a tuning changed in a group is computed when its first tensor is read, and kept until its last
        one is: read them in the order of `tensors`.

        Raises:
            ExportError: float16 can't hold it.
        """
        group = self._group_of[name]
        if name not in self._pending:
            self._pending = self._change(group)
        change = self._pending.pop(name, None)
        stored, dtype = self.tensors[name], self.tensors[name].dtype
        if name in self.changes.files:
            result = self.changes.read_file(name).add_(self.read_stored(name))
        elif change is None:
            result = self.read_stored(name)
        elif self._is_added_to(group):
            result = change.reshape(stored.shape).add_(self.read_stored(name))
        else:
            result = change.reshape(stored.shape)
        result = result.to(dtype)
        if dtype == torch.float16 and not result.isfinite().all():
            raise ExportError(
                f"`{name}` holds values beyond what float16 can hold", "use --dtype bfloat16 or float32"
            )
        return result

    def read_stored(self, name: str) -> torch.Tensor:
        """Return the base model's tensor that the one called `name` is made from."""
        return self.source.read(self._stored[name])

    def change_of(self, parameter: str) -> str | None:
        """Return the name under which the tuning changed a parameter: its own, or that of one tied to it."""
        same = self._ties.get(parameter, [parameter]) if self.changes.keeps_ties else [parameter]
        return next((name for name in (parameter, *same) if name in self._changed), None)

    def _change(self, group: Group) -> dict[str, torch.Tensor]:
        """Return what is added to a group's tensors in the files, or what they become; nothing if they stay."""
        changed = {parameter: self.change_of(parameter) for parameter in group.parameters}
        if not any(changed.values()):
            return {}
        if self._is_added_to(group):
            result = {
                parameter: self.changes.read(name)
                if name is not None
                else torch.zeros(self._shapes[parameter])
                for parameter, name in changed.items()
            }
        elif self.changes.replaced.issuperset(changed.values()):
            result = {parameter: self.changes.read(name) for parameter, name in changed.items() if name}
        else:
            stored = {name: self.read_stored(name).float() for name in group.files}
            result = {
                parameter: apply_changes(self.changes, changed[parameter] or parameter, base)
                for parameter, base in self.names.to_parameters(group, stored).items()
            }
        return self.names.to_files(group, result)

    def _is_added_to(self, group: Group) -> bool:
        return all(self.change_of(name) in (None, *self.changes.added) for name in group.parameters)

    def _resized(self, group: Group, stored: torch.Tensor) -> torch.Tensor:
        shapes = [self.changes.shapes.get(self.change_of(name) or "") for name in group.parameters]
        shape = next((shape for shape in shapes if shape is not None), None)
        return stored if shape is None else torch.empty(shape, dtype=stored.dtype, device="meta")

    def _untied_groups(self) -> list[Group]:
        """Return groups of their own for parameters that the files lack because another one stands for them."""
        found = {parameter: group for group in self.names.groups for parameter in group.parameters}
        groups = []
        for parameter, tied in self._ties.items():
            stored = next((found[name].files for name in tied if name in found), ())
            if parameter not in found and len(stored) == 1:
                name = self.names.name_in_files(parameter)
                self._stored[name] = stored[0]
                groups.append(Group((name,), (parameter,)))
        return groups

    def _check(self) -> None:
        found = {self.change_of(parameter) for group in self.groups for parameter in group.parameters}
        absent = sorted(self._changed - found)
        if absent:
            raise ModelError(
                f"the weight files in `{self.source.folder}` lack {', '.join(f'`{name}`' for name in absent[:3])}",
                "give the base model's folder as it was published",
            )


def open_merge(tuned: TunedModel, files: ModelRef, dtype: torch.dtype | None) -> Merge:
    """Return the weights of `tuned`, from a model's `files` and what the tuning changed; reads headers alone.

    Raises:
        ModelError: the files hold no such model, or the tuned one wasn't made from it.
        CheckpointError: the checkpoint's state is torn.
    """
    model_config = load_model_config(files)
    if getattr(model_config, "quantization_config", None) is not None:
        raise ModelError(
            f"`{files.source}` is quantized, and a merge would need its weights as they were before",
            "name the model it was quantized from with --model_path, or export with --no_merge",
        )
    model = build_meta_model(files, model_config)
    source = open_source(files)
    changes: Changes
    if tuned.kind == "adapter":
        changes = _open_adapter(tuned.folder, model, files, source)
    elif tuned.kind == "state":
        changes = StateChanges(tuned.folder, model, str(files.source))
    else:
        changes = NoChanges()
    return Merge(source, model, changes, dtype)


def _open_adapter(folder: Path, model: PreTrainedModel, files: ModelRef, source: WeightSource) -> Changes:
    check_repeatable(folder)
    try:
        return AdapterChanges(folder, model, str(files.source), source.tensors)
    except ForeignAdapterError as error:
        logger.info("PEFT merges the adapter `%s`, in memory: %s", folder, error.message)
        return MergedByPeft(folder, model, files)


def _find_ties(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return for each parameter that shares its weights all that share them."""
    sharing: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        sharing.setdefault(source, [source]).append(target)
    return {name: names for names in sharing.values() for name in names}


def cast_weights(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
