"""Which of a folder's weight files transformers reads: the others beside them may be stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

from tunesmith.config import ModelRef
from tunesmith.errors import ModelError

_NAMES = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"


def list_weight_files(ref: ModelRef) -> list[Path]:
    """Return the files that `from_pretrained` reads a model's weights from, fetching what the hub's cache lacks.

    A single file goes before an index beside it, and safetensors before pickles. A configuration may name the file.

    Source: transformers.modeling_utils._get_resolved_checkpoint_files.

    Raises:
        ModelError: there are none, or the index names one that is absent.
    """
    for name in _named_by_config(ref) or [name + end for name in _NAMES for end in ("", _INDEX)]:
        path = locate_file(ref, name)
        if path is not None:
            return _read_index(ref, path) if name.endswith(_INDEX) else [path]
    refuse_without(ref, _NAMES[0])


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


def refuse_without(ref: ModelRef, name: str) -> NoReturn:
    """Say that the model lacks a file.

    Raises:
        ModelError: always.
    """
    raise ModelError(f"`{ref.source}` has no `{name}`", "give a whole model folder with --model_path")


def _named_by_config(ref: ModelRef) -> list[str]:
    path = locate_file(ref, "config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except ValueError:  # told by whoever reads the configuration
        return []
    name = content.get("transformers_weights") if isinstance(content, dict) else None
    return [name] if isinstance(name, str) else []


def _read_index(ref: ModelRef, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"`{index}` is no index of weight files", "get the model again") from error
    found = {name: locate_file(ref, name) for name in names}
    absent = [name for name, path in found.items() if path is None]
    if absent:
        more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
        raise ModelError(
            f"`{index}` names the weight file `{absent[0]}`{more}, and `{ref.source}` doesn't have it",
            "get the whole model again; or remove the index if it is stale",
        )
    return [path for path in found.values() if path is not None]
