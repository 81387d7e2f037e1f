"""The whole model on each worker; its gradients are summed."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tunesmith.parallel.casting import Fill, cast_weights
from tunesmith.parallel.mesh import Mesh

# Large enough for a network's full speed. With gloo, where a number stands in its bucket decides in which order more
# than two ranks add it up, and runs on CPUs go on bit for bit: there it stays one.
_BUCKET_BYTES = {"cuda": 25 << 20}
_ALL_AT_ONCE = sys.maxsize


def replicate_model(
    model: nn.Module, device: torch.device, dtype: torch.dtype, fill: Fill | None = None
) -> None:
    """Put the whole model on `device`, in place: frozen weights in `dtype` or their bytes, trained ones in float32.

    `fill` reads those weights that are on the meta device.
    """
    cast_weights(model, dtype)
    if fill is not None:
        fill(model, device)
    model.to(device)


class GradientSum:
    """Adds up the gradients of a replicated model over all ranks, in float32: buckets of them, each as soon as it is whole.

    Made for one step. Every rank must `finish` it, whether or not it had rows.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, bucket_bytes: int | None = None) -> None:
        """Without `bucket_bytes` buckets are as large as the model's device likes."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if bucket_bytes is None:
            bucket_bytes = _BUCKET_BYTES.get(trained[0].device.type, _ALL_AT_ONCE)
        self._trained = trained
        self._mesh = mesh
        self._buckets = _fill_buckets(trained, bucket_bytes)
        self._ready: set[int] = set()
        self._started: list[tuple[Tensor, dist.Work]] = []
        self._hooks: list[RemovableHandle] = []

    def begin(self) -> None:
        """Say that the next backward pass is this rank's last of the step."""
        if self._mesh.size > 1 and len(self._buckets) > 1:
            self._hooks = [p.register_post_accumulate_grad_hook(self._note) for p in self._trained]

    def finish(self) -> None:
        """Leave the sums in the gradients. Collective."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._trained:
            if parameter.grad is None:  # this rank had no rows
                parameter.grad = torch.zeros_like(parameter)
        if self._mesh.size == 1:
            return
        while len(self._started) < len(self._buckets):
            self._start_next()
        for bucket, (flat, work) in zip(self._buckets, self._started, strict=True):
            work.wait()
            gradients = _gradients_of(bucket)
            for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def _note(self, parameter: Tensor) -> None:
        assert id(parameter) not in self._ready, (
            "a pass adds to a gradient once: its bucket may be on its way"
        )
        self._ready.add(id(parameter))
        # One after another: all ranks must begin them in the same order.
        while len(self._started) < len(self._buckets):
            if not self._ready.issuperset(map(id, self._buckets[len(self._started)])):
                break
            self._start_next()

    def _start_next(self) -> None:
        flat = torch.cat(
            [gradient.flatten() for gradient in _gradients_of(self._buckets[len(self._started)])]
        )
        self._started.append((flat, self._mesh.start_sum(flat)))


def _gradients_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _fill_buckets(trained: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Return the parameters in buckets of at least so many bytes, those first whose gradients come first: the last."""
    buckets: list[list[nn.Parameter]] = [[]]
    room = bucket_bytes
    for parameter in reversed(trained):
        if room <= 0:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].insert(0, parameter)
        room -= parameter.nbytes
    return buckets
