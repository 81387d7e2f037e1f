"""What one step and one evaluation compute, over all workers."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tunesmith.data.batches import Batch, Sequences, empty_batch, microbatch_seed, microbatches_for_rank
from tunesmith.model.policy import Policy
from tunesmith.objectives.base import LOSS, LossOutput, Objective
from tunesmith.parallel.collectives import sum_over_ranks
from tunesmith.parallel.fsdp import release_gathered
from tunesmith.parallel.replicate import sum_gradients
from tunesmith.train.worker import Worker


@dataclass(frozen=True)
class Gradients:
    """The result of a step's forward and backward passes.

    Attributes:
        sums: this rank's share of the objective's sums by name; float32 scalars.
        data_wait_s: seconds that this rank waited for batches.
    """

    sums: dict[str, Tensor]
    data_wait_s: float


def accumulate_gradients(
    policy: Policy,
    objective: Objective,
    sequences: Sequences,
    microbatches: Sequence[np.ndarray],
    step: int,
    seed: int,
    worker: Worker,
    sequences_per_forward: int,
) -> Gradients:
    """Run this rank's share of the step's microbatches; leave the global batch's gradient on the weights.

    Of a microbatch `sequences_per_forward` are run at once.

    The gradient is that of the objective's mean over the whole global batch. Nothing here waits for a GPU: while it
    computes one microbatch, the host collates the next. Collective.
    """
    model = policy.model
    counts = sequences.count(np.concatenate(microbatches))
    denominators = objective.denominators(counts)
    numbers = microbatches_for_rank(len(microbatches), worker.rank, worker.world_size)
    is_sharded = isinstance(model, FSDPModule)
    # Adapters' gradients are exchanged once a step. Those of all weights can't wait: whole and in float32,
    # they would cost every worker more memory than the model.
    trains_all = all(parameter.requires_grad for parameter in model.parameters())
    sums = {name: torch.zeros((), device=worker.device) for name in denominators}
    data_wait_s = 0.0
    for i, number in enumerate(numbers):
        torch.manual_seed(microbatch_seed(seed, step, len(microbatches) if number is None else number))
        whole = None if number is None else microbatches[number]
        parts = split_microbatch(whole, microbatches, sequences_per_forward, is_sharded)
        for j, rows in enumerate(parts):
            if isinstance(model, FSDPModule):
                is_last = i == len(numbers) - 1 and j == len(parts) - 1
                model.set_requires_gradient_sync(trains_all or is_last)
            start = time.perf_counter()
            batch = collate_rows(sequences, rows).to(worker.device)
            data_wait_s += time.perf_counter() - start
            output = objective.loss(batch, counts, policy)
            (output.loss_sum / max(1, denominators[LOSS])).backward()
            add_up(sums, output)
            # Or its graph, spread over the heap, would break up the room that the next one's activations need.
            del output
    if not is_sharded:
        sum_gradients(model)
    return Gradients(sums, data_wait_s)


def add_up(sums: dict[str, Tensor], output: LossOutput) -> None:
    """Add what a batch has added, in place."""
    for name, value in output.sums.items():
        sums[name] += value.detach()


def divide(sums: Mapping[str, float], denominators: Mapping[str, int]) -> dict[str, float]:
    """Return the mean of each sum; NaN where there is nothing to divide by."""
    return {
        name: value / denominators[name] if denominators[name] else math.nan for name, value in sums.items()
    }


def split_microbatch(
    rows: np.ndarray | None, microbatches: Sequence[np.ndarray], sequences_per_forward: int, is_sharded: bool
) -> list[np.ndarray | None]:
    """Return the parts of a microbatch that are run one after another, of at most `sequences_per_forward` each.

    None is one without rows. Under FSDP every rank must run equally many, whatever the microbatch; a rank without
    one (None) runs empty ones.
    """
    parts: list[np.ndarray | None] = []
    if rows is not None:
        parts += [
            rows[start : start + sequences_per_forward]
            for start in range(0, len(rows), sequences_per_forward)
        ]
    num_parts = math.ceil(max(map(len, microbatches)) / sequences_per_forward) if is_sharded else 0
    return parts + [None] * (num_parts - len(parts))


def collate_rows(sequences: Sequences, rows: np.ndarray | None) -> Batch:
    """Return the batch of these rows, or one without a trained token."""
    return empty_batch(sequences.pad_token_id) if rows is None else sequences.collate(rows)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of all ranks down to `max_norm` (0: leave them) and return their norm before, a scalar."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def read_scalars(*scalars: Tensor) -> list[float]:
    """Return the values of scalars in one transfer, so that the host waits once for a GPU."""
    first = scalars[0]
    values: list[float] = torch.stack([scalar.to(first) for scalar in scalars]).tolist()
    return values


@torch.no_grad()
def evaluate(
    policy: Policy,
    objective: Objective,
    sequences: Sequences,
    microbatches: Sequence[np.ndarray],
    worker: Worker,
    group: dist.ProcessGroup,
) -> dict[str, float]:
    """Return the objective's loss and metrics by name over all ranks; NaN where there is nothing to divide by.

    Collective: every rank must call it. Leaves the model in training mode.
    """
    model = policy.model.eval()
    counts = sequences.count(np.concatenate(microbatches))
    denominators = objective.denominators(counts)
    sums = {name: torch.zeros((), device=worker.device) for name in denominators}
    for number in microbatches_for_rank(len(microbatches), worker.rank, worker.world_size):
        rows = None if number is None else microbatches[number]
        batch = collate_rows(sequences, rows).to(worker.device)
        add_up(sums, objective.loss(batch, counts, policy))
    model.train()
    release_gathered(model)
    totals = sum_over_ranks(read_scalars(*sums.values()), group)
    return divide(dict(zip(sums, totals, strict=True)), denominators)
