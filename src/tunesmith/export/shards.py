"""Weights into safetensors files of limited size, and the index beside them."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards

from tunesmith.config.size import parse_size
from tunesmith.export.merge import Merge
from tunesmith.model.files.tensor_files import write_tensors
from tunesmith.view.bar import track_progress

INDEX_FILE = "model.safetensors.index.json"


def write_shards(merge: Merge, folder: Path, max_shard_size: str) -> int:
    """Write the weights into `folder`, holding one group of tensors at a time; return the number of files.

    A tensor that is larger than `max_shard_size` gets a file of its own.

    Raises:
        ExportError: float16 can't hold a weight.
        OSError: a file can't be written or read.
    """
    plan = split_torch_state_dict_into_shards(merge.tensors, max_shard_size=parse_size(max_shard_size))
    total = count_bytes(merge)
    with track_progress("writing weights", total, "bytes") as tracker:
        for file, names in plan.filename_to_tensors.items():
            tensors = {name: merge.tensors[name] for name in names}
            contents = ((name, merge.read(name)) for name in names)
            write_tensors(folder / file, tensors, contents, tracker.advance)
    if plan.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return len(plan.filename_to_tensors)


def count_bytes(merge: Merge) -> int:
    """Return the bytes of all weights that are to be written."""
    return sum(tensor.nbytes for tensor in merge.tensors.values())
