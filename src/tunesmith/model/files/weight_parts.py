"""A model's parameters, or slices of them, as they are made of what lies in its files.

Shapes: N experts, O outputs, D inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.model.files.weight_names import Group, NameMap
from tunesmith.model.files.weight_source import WeightSource


class WeightParts:
    """Reads parameters by their names in the model, each into memory of its own.

    Of one that is as the files have it, or a stack of what they have, no more is read than is asked for.
    """

    def __init__(self, source: WeightSource, names: NameMap) -> None:
        self._source, self._names = source, names
        self._groups = {name: group for group in names.groups for name in group.parameters}

    def read(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], begins: tuple[int, ...] | None = None
    ) -> Tensor:
        """Return the slice of a parameter that has this shape and begins there, or all of it, in `dtype`."""
        begins = begins or (0,) * len(shape)
        if 0 in shape:  # of few rows, some ranks have none
            return torch.empty(shape, dtype=dtype)
        group = self._groups[name]
        stack = self._names.stacked_files(group)
        if stack is not None and shape[2] == self._source.tensors[stack[0][0]].shape[1]:
            return self._read_stack(stack, shape, begins).to(dtype)
        plain = self._source.tensors[group.files[0]]
        if not self._names.is_converted(group) and shape[1:] == plain.shape[1:]:
            return self._read_rows(group.files[0], shape, begins[0] if begins else 0).to(dtype)
        if not self._names.is_converted(group) and len(shape) == 3 and shape[2] == plain.shape[2]:
            return self._read_blocks(group.files[0], shape, begins).to(dtype)
        part = self._convert(group, name, dtype)
        for dim, (begin, length) in enumerate(zip(begins, shape, strict=True)):
            part = part.narrow(dim, begin, length)
        return part.contiguous()

    def _read_rows(self, file: str, shape: tuple[int, ...], begin: int) -> Tensor:
        tensor = self._source.tensors[file]
        rows = torch.empty(shape, dtype=tensor.dtype)
        self._source.read_part(file, begin * (tensor.stride(0) if shape else 1), rows)
        return rows

    def _read_blocks(self, file: str, shape: tuple[int, ...], begins: tuple[int, ...]) -> Tensor:
        """Return rows (O, D) of each expert of a tensor that is stacked in the files."""
        tensor = self._source.tensors[file]
        part_NOD = torch.empty(shape, dtype=tensor.dtype)
        for expert, rows_OD in enumerate(part_NOD, begins[0]):
            first = expert * tensor.stride(0) + begins[1] * tensor.stride(1)
            self._source.read_part(file, first, rows_OD)
        return part_NOD

    def _read_stack(self, stack: list[list[str]], shape: tuple[int, ...], begins: tuple[int, ...]) -> Tensor:
        """Return rows (O, D) of each expert, whose matrices lie in the files one by one."""
        part_NOD = torch.empty(shape, dtype=self._source.tensors[stack[0][0]].dtype)
        for rows_OD, files in zip(part_NOD, stack[begins[0] :], strict=False):
            start = -begins[1]  # of a file's rows, among those that are asked for
            for file in files:
                tensor = self._source.tensors[file]
                first, last = max(0, start), min(shape[1], start + tensor.shape[0])
                if first < last:
                    self._source.read_part(file, (first - start) * tensor.stride(0), rows_OD[first:last])
                start += tensor.shape[0]
        return part_NOD

    def _convert(self, group: Group, name: str, dtype: torch.dtype) -> Tensor:
        files = {file: self._source.read(file).to(dtype) for file in group.files}
        return self._names.to_parameters(group, files)[name]
