"""The proof for a model that memory doesn't hold: rows of its tensors, computed once more in float64."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors import safe_open

from tunesmith.errors import ExportError
from tunesmith.export.adapter_parts import Factors
from tunesmith.export.compare import count_inexact
from tunesmith.export.deltas import AdapterChanges
from tunesmith.export.merge import Merge
from tunesmith.export.proof import Proof
from tunesmith.export.shards import INDEX_FILE
from tunesmith.model.files.weight_names import Group

_NUM_CHANGED, _NUM_UNCHANGED = 48, 16
_NUM_ROWS = 64


def prove_by_sample(merge: Merge, folder: Path, seed: int = 0) -> Proof:
    """Compare a sample of the written weights; memory stays at a few tensors of the files.

    The written tensors are read by the safetensors library and turned into parameters the way transformers
    loads them, where the export turned parameters into tensors; a delta's rows come of a product in float64.

    Raises:
        ExportError: a weight differs, or a tensor is absent or of another shape or type.
    """
    files = check_headers(merge, folder)
    changed = [
        group
        for group in merge.groups
        if any(map(merge.change_of, group.parameters)) or merge.changes.files.intersection(group.files)
    ]
    unchanged = [group for group in merge.groups if group.parameters and group not in changed]
    draw = random.Random(seed)
    chosen = draw.sample(changed, min(len(changed), _NUM_CHANGED))
    chosen += draw.sample(unchanged, min(len(unchanged), _NUM_UNCHANGED))
    num_weights = num_inexact = 0
    for group in chosen:
        for name, found, expected in _sample_rows(merge, group, files, draw):
            num_weights += found.numel()
            num_inexact += count_inexact(name, found, expected.to(found.dtype))
    return Proof("sampled", num_weights, num_inexact)


def check_headers(merge: Merge, folder: Path) -> dict[str, Path]:
    """Return the file of each written tensor.

    Raises:
        ExportError: a tensor is absent, too many, or of another shape.
    """
    index = folder / INDEX_FILE
    paths = {folder / "model.safetensors"}
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = {folder / file for file in weight_map.values()}
    shapes, files = {}, {}
    for path in sorted(paths):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                shapes[name], files[name] = tuple(file.get_slice(name).get_shape()), path
    wanted = {name: tuple(tensor.shape) for name, tensor in merge.tensors.items()}
    if shapes != wanted:
        different = sorted(name for name in shapes.keys() | wanted if shapes.get(name) != wanted.get(name))
        raise ExportError(
            f"the export isn't the tuned model: `{different[0]}` is absent, too many, or of another shape",
            "nothing was put in place",
        )
    return files


def _sample_rows(
    merge: Merge, group: Group, files: dict[str, Path], draw: random.Random
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Return for each parameter of a group its name, written rows, and what they should be, in float64."""
    written = {}
    for name in group.files:
        with safe_open(files[name], framework="pt") as file:
            written[name] = file.get_tensor(name)
    found = merge.names.to_parameters(group, written)
    base = merge.names.to_parameters(group, {name: _read_base(merge, name) for name in group.files})
    rows = []
    for parameter, tensor in found.items():
        if tensor.dim() == 0:
            rows.append((parameter, tensor, base[parameter].double()))
            continue
        block = draw.randrange(len(tensor)) if tensor.dim() == 3 else None
        matrix = tensor if block is None else tensor[block]
        chosen = torch.tensor(sorted(draw.sample(range(len(matrix)), min(len(matrix), _NUM_ROWS))))
        expected = _expected_rows(merge, parameter, base[parameter], block, chosen)
        rows.append((parameter, matrix[chosen], expected))
    return rows


def _read_base(merge: Merge, name: str) -> torch.Tensor:
    """Return what a parameter is made of: the base's tensor, and what is added to that before."""
    stored = merge.read_stored(name)
    return stored.double() + merge.changes.read_file(name) if name in merge.changes.files else stored


def _expected_rows(
    merge: Merge, parameter: str, base: torch.Tensor, block: int | None, rows: torch.Tensor
) -> torch.Tensor:
    changes, changed = merge.changes, merge.change_of(parameter)
    if changed is not None and changed in changes.remade:
        return changes.remake(changed, base.double())[rows]
    if changed is not None and changed in changes.replaced:
        base = changes.read(changed)
    expected = (base if block is None else base[block])[rows].double()
    if changed is None or changed not in changes.added:
        return expected
    assert isinstance(changes, AdapterChanges), "nothing else adds"
    factors = changes.parts[changed].factors
    if factors is None:  # a bias
        return expected + changes.read(changed)[rows]
    return expected + _delta_rows(*changes.read_factors(factors), factors, block, rows)


def _delta_rows(
    a: torch.Tensor, b: torch.Tensor, factors: Factors, block: int | None, rows: torch.Tensor
) -> torch.Tensor:
    a, b = a.double(), b.double()
    if factors.num_experts is not None:
        a = a.unflatten(0, (factors.num_experts, -1))[block]
        b = b.unflatten(1, (-1, factors.num_experts))[..., block]
    product = a[:, rows].T @ b.T if factors.transposed else b[rows] @ a
    return product * factors.scale
