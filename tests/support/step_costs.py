"""What a step costs, counted instead of timed: operations, bytes, collectives, and the waits for a GPU.

The way that a GPU takes is gone on torch's meta device: its tensors hold no data, so whatever needs their values
fails there, and every wait for them is seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.runs import small_config, start
from tunesmith.model.kernels import attention
from tunesmith.model.kernels.install import GPU, install_kernels
from tunesmith.planning.shared_inputs import find_shared_inputs
from tunesmith.train.optimizer import build_optimizer
from tunesmith.train.set_up import set_up
from tunesmith.train.state import Training
from tunesmith.train.worker import ProcessWorker

META = torch.device("meta")
# They say how large a tensor is to be, and touch none of its bytes.
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def set_up_training(
    model: Path, rows: Path, folder: Path, rank: int = 0, world_size: int = 1, **changes: Any
) -> Training:
    """Return a training in bfloat16 of two packed rows a microbatch, three microbatches a step."""
    settings: dict[str, Any] = {"dtype": "bfloat16", "max_seq_length": 512, "gradient_accumulation_steps": 3}
    job = start(small_config(model, rows, folder / "home", **{**settings, **changes}), world_size)
    return set_up(job, ProcessWorker(rank, world_size, torch.device("cpu"), job.run))


@contextmanager
def on_meta(training: Training) -> Iterator[Training]:
    """Yield the training with its model on the meta device, where it goes the way of GPUs."""
    learner, model = training.learner, training.model.to(META)
    # torch's own norms go another way without data.
    install_kernels(model, replace(GPU, torch_norms=False), find_shared_inputs(model))
    fused_devices = torch_optimizer._get_fused_kernels_supported_devices()
    with pytest.MonkeyPatch.context() as patch:
        # These go by the device, and know of GPUs and CPUs.
        patch.setattr(attention, "_attend_on_cpu", attention._attend_on_gpu)
        patch.setattr(
            torch_optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused_devices, "meta"]
        )
        yield replace(
            training,
            learner=replace(learner, policy=replace(learner.policy, model=model), device=META),
            optimizer=build_optimizer(model.parameters(), training.config),
            worker=replace(training.worker, device=META),
        )


def _count_added_product(
    added: torch.Size, left: torch.Size, right: torch.Size, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return 2 * math.prod(left) * right[-1]


# What torch's counter of FLOP leaves out.
IN_PLACE_PRODUCTS = {
    torch.ops.aten.addmm_: _count_added_product,
    torch.ops.aten.baddbmm_: _count_added_product,
}


class HostWaits(TorchDispatchMode):
    """Counts what the host waits for: values read from the meta device, and copies to it that block.

    Reads are answered with ones. What makes a shape of values, as `nonzero` does, fails on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.blocking_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, device = func.overloadpacket.__name__, kwargs.get("device")
        if name == "_local_scalar_dense" and args[0].is_meta:
            self.reads += 1
            return 1.0
        if name == "_to_copy" and args[0].is_meta and device is not None and device.type == "cpu":
            self.reads += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        outputs = func(*args, **kwargs)
        is_copy = name in ("_to_copy", "copy_") and any(output.is_meta for output in _tensors(outputs))
        if is_copy and not all(tensor.is_meta for tensor in _tensors((args, kwargs))):
            self.blocking_copies += not (kwargs.get("non_blocking") or True in args[2:])
        return outputs


class BytesMoved(TorchDispatchMode):
    """Adds up the bytes that operations read and write; views and allocations move none."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _ALLOCATIONS and not _is_view(func, args, outputs):
            self.total += sum(tensor.nbytes for tensor in _tensors((args, kwargs, outputs)))
        return outputs


class CollectiveBytes(TorchDispatchMode):
    """Lists the collectives on tensors, by name and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            num_bytes = sum(tensor.nbytes for tensor in _tensors(args))
            self.counts[func.overloadpacket.__name__, num_bytes] += 1
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_view(func: Any, args: Any, outputs: Any) -> bool:
    if func._schema.is_mutable:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
    return any(output.untyped_storage()._cdata in storages for output in _tensors(outputs))
