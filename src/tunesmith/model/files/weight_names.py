"""Which tensors of the files transformers makes a model's parameters of, and the way back.

transformers renames what older files hold and fuses or splits some tensors while it loads them: Mixtral's
`experts.0.w1.weight` … become `experts.gate_up_proj`. All of this rearranges numbers and computes nothing, so
a parameter's change is rearranged like the parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensors = Mapping[str, torch.Tensor]

# What turns matrices into one tensor of them, by transformers' operations and their dimensions.
_STACKS = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def find_stacked(model: Any) -> list[torch.nn.Parameter]:
    """Return a model's experts that are made of tensors which the files have one by one; it may have adapters."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    targets = [
        target
        for step in get_model_conversion_mapping(base)
        if isinstance(step, WeightConverter)
        and any(isinstance(it, MergeModulelist) for it in step.operations)
        for target in step.target_patterns
    ]
    named = [(name.replace(".base_layer", ""), parameter) for name, parameter in base.named_parameters()]
    return [parameter for name, parameter in named if any(target in name for target in targets)]


def find_older_names(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Return those of the names that only files have: transformers makes parameters of other names of them."""
    steps, expected = get_model_conversion_mapping(model), model.state_dict()
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    targets = {
        name: rename_source_key(name, renamings, converters, model.base_model_prefix, expected)[0]
        for name in names
        if name not in expected
    }
    return {name for name, target in targets.items() if target in expected}


@dataclass(frozen=True)
class Group:
    """Tensors of the files, and the parameters that come of them: mostly one and one; none if left unread."""

    files: tuple[str, ...]
    parameters: tuple[str, ...]


class NameMap:
    """The groups of a model's tensors, in the files' order. The model may be on the meta device.

    Raises:
        ModelError: the files' shapes aren't those of the model's configuration.
    """

    def __init__(self, model: PreTrainedModel, tensors: Tensors) -> None:
        self._model = model
        self._transforms = get_model_conversion_mapping(model)
        self._converters: dict[tuple[str, ...], tuple[WeightConverter, dict[str, str], str]] = {}
        expected = model.state_dict()
        collected: dict[str, dict[str, str | None]] = {}
        unread = []
        # transformers' own order: some renamings depend on what came before.
        for name in sorted(tensors, key=dot_natural_key):
            target, pattern = self._rename(name, expected)
            if target in expected:
                collected.setdefault(target, {})[name] = pattern
            else:
                unread.append(Group((name,), ()))
        # What `from_pretrained` leaves behind, for the way back.
        model._weight_conversions = [step for step in self._transforms if step.was_used()]
        groups = [self._group(target, sources, tensors) for target, sources in collected.items()]
        self._check_shapes(groups, tensors, expected)
        position = {name: number for number, name in enumerate(tensors)}
        self.groups = sorted(groups + unread, key=lambda group: min(position[name] for name in group.files))

    def to_parameters(self, group: Group, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Return a group's parameters, given its tensors in the files."""
        if group.files not in self._converters:
            return {group.parameters[0]: tensors[group.files[0]]}
        shared, patterns, target = self._converters[group.files]
        return self._convert(shared, patterns, target, tensors)

    def to_files(self, group: Group, parameters: Tensors) -> dict[str, torch.Tensor]:
        """Return a group's tensors as they lie in the files, given all of its parameters.

        Raises:
            ModelError: transformers can't turn this conversion back.
        """
        if group.files not in self._converters:
            return {group.files[0]: parameters[group.parameters[0]]}
        prefix = self._model.base_model_prefix
        found = {}
        for name, tensor in revert_weight_conversion(self._model, dict(parameters)).items():
            # Files of a model without its head lack the prefix, which loading adds in silence.
            for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
                if candidate in group.files:
                    found[candidate] = tensor
        if set(found) != set(group.files):
            raise ModelError(
                f"transformers can't turn `{group.parameters[0]}` back into what the files hold: {', '.join(group.files[:3])} …",
                "save the base model again with transformers' save_pretrained, and name that folder with --model_path",
            )
        return found

    def is_converted(self, group: Group) -> bool:
        """Return whether a group's parameters are made of its tensors; else the one is the other."""
        return group.files in self._converters

    def stacked_files(self, group: Group) -> list[list[str]] | None:
        """Return the files' matrices that a parameter (N, O, D) stacks: of each of N those whose rows follow one another.

        None if it is made in another way, or of matrices that aren't alike.
        """
        if not self.is_converted(group) or len(group.parameters) > 1:
            return None
        converter, patterns, _ = self._converters[group.files]
        kinds = [(type(step), step.dim) for step in converter.operations if hasattr(step, "dim")]
        if len(kinds) < len(converter.operations) or kinds not in _STACKS:
            return None
        matrices = [[name for name in patterns if patterns[name] == it] for it in converter.source_patterns]
        matrices = [names for names in matrices if names]
        if len({len(names) for names in matrices}) > 1 or len(matrices) > len(kinds):
            return None
        return [list(files) for files in zip(*matrices, strict=True)]

    def name_in_files(self, parameter: str) -> str:
        """Return the name under which a parameter that the files lack is found if it is added to them."""
        expected = self._model.state_dict()
        (reverted,) = revert_weight_conversion(self._model, {parameter: expected[parameter]})
        return next(
            name for name in (reverted, parameter) if self._rename(name, expected) == (parameter, None)
        )

    def _rename(self, name: str, expected: Tensors) -> tuple[str, str | None]:
        """Return the parameter that a tensor goes to, its group's first, and the converter's pattern.

        Source: transformers.core_model_loading.convert_and_load_state_dict_in_model.
        """
        renamings = [step for step in self._transforms if isinstance(step, WeightRenaming)]
        converters = [step for step in self._transforms if isinstance(step, WeightConverter)]
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        return target, pattern

    def _group(self, target: str, sources: dict[str, str | None], tensors: Tensors) -> Group:
        patterns = {name: pattern for name, pattern in sources.items() if pattern is not None}
        if not patterns:
            return Group(tuple(sources), (target,))
        converter = next(
            step
            for step in self._transforms
            if isinstance(step, WeightConverter) and next(iter(patterns.values())) in step.source_patterns
        )
        self._converters[tuple(patterns)] = (converter, patterns, target)
        return Group(tuple(patterns), tuple(self._convert(converter, patterns, target, tensors)))

    def _convert(
        self, shared: WeightConverter, patterns: dict[str, str], target: str, tensors: Tensors
    ) -> dict[str, torch.Tensor]:
        converter: Any = deepcopy(shared)
        for name, pattern in patterns.items():
            converter.add_tensor(target, name, pattern, tensors[name])
        converted = converter.convert(target, model=self._model, config=self._model.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in converted.items()}

    def _check_shapes(self, groups: list[Group], tensors: Tensors, expected: Tensors) -> None:
        for group in groups:
            for name, tensor in self.to_parameters(group, tensors).items():
                if name not in expected or tensor.shape != expected[name].shape:
                    shape = tuple(expected[name].shape) if name in expected else "none"
                    raise ModelError(
                        f"the files of `{self._model.name_or_path}` hold `{name}` of shape {tuple(tensor.shape)}, "
                        f"its configuration asks for {shape}",
                        "give the base model's folder as it was published",
                    )
