"""The safetensors format, tensor by tensor: the library's own writer copies a whole file's tensors twice.

A file is 8 bytes with the header's length (little-endian), the header as JSON (name → dtype, shape, offsets
behind the header), and the tensors' bytes without gaps.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import ModelError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorFile:
    """A safetensors file open for reading. `tensors`: shape and dtype by name, on the meta device.

    Each read fetches one tensor's bytes into memory of its own: a mapped file would count as ours.

    Raises:
        ModelError: it isn't a whole safetensors file, or holds a type that only quantized models have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, torch.Tensor] = {}
        self._starts: dict[str, int] = {}
        with path.open("rb") as file:
            try:
                length = int.from_bytes(file.read(8), "little")
                header = dict(json.loads(file.read(length)))
            except (ValueError, MemoryError, OverflowError) as error:
                raise _torn(path, f"its header can't be read ({error})") from error
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _DTYPES:
                raise ModelError(
                    f"`{name}` in `{path}` has the type {entry['dtype']}, as quantized models have",
                    "take the base model in bfloat16, float16 or float32, or export with --no_merge",
                )
            dtype = _DTYPES[entry["dtype"]]
            self.tensors[name] = torch.empty(entry["shape"], dtype=dtype, device="meta")
            self._starts[name] = 8 + length + entry["data_offsets"][0]
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != end:
            raise _torn(path, f"it has {path.stat().st_size:,} bytes of {end:,}")

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor called `name`."""
        tensor = torch.empty_like(self.tensors[name], device="cpu")
        self.read_part(name, 0, tensor)
        return tensor

    def read_part(self, name: str, first: int, out: torch.Tensor) -> None:
        """Fill `out`, contiguous and of the tensor's dtype, with its numbers from the one called `first` on."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._starts[name] + first * out.itemsize)
            _transfer(file.readinto, out)


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    contents: Iterable[tuple[str, torch.Tensor]],
    advance: Callable[[int], None],
) -> None:
    """Write a safetensors file, holding no more than one tensor.

    Args:
        path: the file.
        tensors: shape and dtype of each tensor by name; they may be on the meta device.
        contents: every tensor, in any order.
        advance: called with the number of bytes written, tensor by tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest first, so that each begins at a multiple of its width.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in contents:
            assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype), name
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            _transfer(file.write, tensor.contiguous())
            advance(tensor.nbytes)


def _transfer(move: Callable[[memoryview], int | None], tensor: torch.Tensor) -> None:
    """Read or write all bytes of `tensor`; one call of the system moves 2 GiB at most."""
    content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
    done = 0
    while done < len(content):
        moved = move(content[done:])
        if not moved:
            raise OSError("the file ended too early")
        done += moved


def _torn(path: Path, what: str) -> ModelError:
    return ModelError(f"`{path}` is not a whole safetensors file: {what}", "get or write it again")
