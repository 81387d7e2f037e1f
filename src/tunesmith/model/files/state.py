"""The trained weights in a checkpoint's sharded state, read in one process on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from tunesmith.errors import CheckpointError

STATE_FOLDER = "state"
_WEIGHTS = "model."


def list_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return shape and dtype of a checkpoint's trained weights by name, as tensors on the meta device.

    Raises:
        CheckpointError: the state is absent or torn.
    """
    try:
        items = dcp.FileSystemReader(folder / STATE_FOLDER).read_metadata().state_dict_metadata
    except (OSError, EOFError, ValueError) as error:
        raise _unreadable(folder, error) from error
    return {
        name.removeprefix(_WEIGHTS): torch.empty(item.size, dtype=item.properties.dtype, device="meta")  # type: ignore[union-attr]
        for name, item in items.items()
        if name.startswith(_WEIGHTS)
    }


def read_weights(folder: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Return the whole trained weights of a checkpoint by name: those called `names`, or all of them.

    Raises:
        CheckpointError: the state is absent or torn.
    """
    listed = list_weights(folder)
    chosen = listed if names is None else {name: listed[name] for name in names}
    tensors: dict[str, Any] = {
        f"{_WEIGHTS}{name}": torch.empty_like(tensor, device="cpu") for name, tensor in chosen.items()
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder / STATE_FOLDER), no_dist=True)
    except (OSError, ValueError, RuntimeError, dcp.api.CheckpointException) as error:
        raise _unreadable(folder, error) from error
    return {name.removeprefix(_WEIGHTS): tensor for name, tensor in tensors.items()}


def _unreadable(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"can't read the weights of the checkpoint `{folder}`: {error}",
        "take another --checkpoint of the run",
    )
