"""A model's weight files, on the disk or in the hub's cache, read one tensor at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import torch

from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.export.tensors import TensorFile

_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


class _File(Protocol):
    tensors: dict[str, torch.Tensor]

    def read(self, name: str) -> torch.Tensor: ...


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


def open_source(ref: ModelRef) -> WeightSource:
    """Find the weight files of a model, fetching what the hub's cache lacks, and read their headers.

    Raises:
        ModelError: there are none, or one is torn.
    """
    folder = Path(locate_file(ref, "config.json") or _nothing(ref, "config.json")).parent
    for name, reader in ((_SAFETENSORS, TensorFile), (_PICKLED, PickledFile)):
        index = locate_file(ref, name + _INDEX)
        if index is not None:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            paths: list[Path] = [locate_file(ref, part) or _nothing(ref, part) for part in names]
            return _collect(folder, [reader(path) for path in paths])
        path = locate_file(ref, name)
        if path is not None:
            return _collect(folder, [reader(path)])
    _nothing(ref, _SAFETENSORS)


def _collect(folder: Path, files: Iterable[_File]) -> WeightSource:
    tensors, by_name = {}, {}
    for file in files:
        tensors.update(file.tensors)
        by_name.update(dict.fromkeys(file.tensors, file))
    return WeightSource(folder, tensors, by_name)


def find_adapter_weights(folder: Path) -> Path:
    """Return the file of an adapter's weights; PEFT too takes safetensors first.

    Raises:
        ModelError: there is none.
    """
    found = next((folder / name for name in _ADAPTERS if (folder / name).is_file()), None)
    if found is None:
        raise ModelError(f"`{folder}` holds no {_ADAPTERS[0]}", "get the adapter again")
    return found


def locate_file(ref: ModelRef, name: str) -> Path | None:
    """Return a file of the model, fetched if need be; None if the model has none of that name.

    Raises:
        ModelError: the hub can't be reached, or has no such model.
    """
    from transformers.utils import cached_file

    try:
        found = cached_file(
            str(ref.source), name, revision=ref.revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError as error:
        raise ModelError(
            f"can't get `{name}` of `{ref.source}`: {str(error).splitlines()[0]}",
            "check the base model's name, the network, and HF_TOKEN for a gated model; or give --model_path",
        ) from error
    return Path(found) if found else None


def _nothing(ref: ModelRef, name: str) -> NoReturn:
    raise ModelError(f"`{ref.source}` has no `{name}`", "give a whole model folder with --model_path")
