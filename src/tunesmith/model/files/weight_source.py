"""A model's weight files, on the disk or in the hub's cache, read one tensor at a time."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.model.files.tensor_files import TensorFile
from tunesmith.model.files.weight_files import list_weight_files, locate_file, refuse_without


class _File(Protocol):
    tensors: dict[str, torch.Tensor]

    def read(self, name: str) -> torch.Tensor: ...

    def read_part(self, name: str, first: int, out: torch.Tensor) -> None: ...


class PickledFile:
    """A `.bin` file, mapped; only tensors are unpickled.

    Raises:
        ModelError: it is torn, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(f"`{path}` is not a whole file of weights: {reason}", "get it again") from error
        self.tensors = {
            name: torch.empty_like(tensor, device="meta") for name, tensor in self._content.items()
        }

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._content[name]
        return tensor.clone()

    def read_part(self, name: str, first: int, out: torch.Tensor) -> None:
        out.copy_(self._content[name].reshape(-1)[first : first + out.numel()].view(out.shape))


@dataclass(frozen=True)
class WeightSource:
    """Weights as they lie in the files of a model folder.

    `tensors`: shape and dtype by the names in the files, on the meta device, in the files' order.
    """

    folder: Path
    tensors: dict[str, torch.Tensor]
    _files: dict[str, _File]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor by its name in the files."""
        return self._files[name].read(name)

    def read_part(self, name: str, first: int, out: torch.Tensor) -> None:
        """Fill `out`, contiguous and of the tensor's dtype, with its numbers from the one called `first` on."""
        self._files[name].read_part(name, first, out)


def open_source(ref: ModelRef) -> WeightSource:
    """Find the weight files of a model that transformers reads, and read their headers.

    Raises:
        ModelError: there are none, or one is absent or torn.
    """
    config = locate_file(ref, "config.json") or refuse_without(ref, "config.json")
    files = [
        (TensorFile if path.suffix == ".safetensors" else PickledFile)(path)
        for path in list_weight_files(ref)
    ]
    return _collect(config.parent, files)


def _collect(folder: Path, files: Iterable[_File]) -> WeightSource:
    tensors, by_name = {}, {}
    for file in files:
        tensors.update(file.tensors)
        by_name.update(dict.fromkeys(file.tensors, file))
    return WeightSource(folder, tensors, by_name)
