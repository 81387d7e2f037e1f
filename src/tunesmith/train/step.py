"""One step: the forward and backward passes of its microbatches, and the update of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tunesmith.data.batches import Counts, Sequences, microbatch_seed
from tunesmith.data.draws import Draws
from tunesmith.model.kernels.dropout import drawing_from
from tunesmith.objectives.base import LOSS
from tunesmith.parallel.fsdp import sync_gradients
from tunesmith.parallel.replicate import GradientSum
from tunesmith.train.learner import Learner, Tally, read_scalars
from tunesmith.train.schedule import learning_rate, set_learning_rate
from tunesmith.train.state import StepResult, Training


@dataclass(frozen=True)
class Gradients:
    """The result of a step's forward and backward passes, besides the gradient on the weights.

    Attributes:
        counts: of the global batch.
        tally: this rank's share of the objective's sums.
        data_wait_s: seconds that this rank waited for batches.
    """

    counts: Counts
    tally: Tally
    data_wait_s: float


def take_step(training: Training, step: int) -> StepResult:
    """Train one step; one whose loss or gradient isn't finite leaves the weights as they are. Collective."""
    config, optimizer = training.config, training.optimizer
    training.meter.start()
    gradients = accumulate_gradients(
        training.learner,
        training.sequences,
        training.plan.microbatches(step),
        step,
        config.seed,
        training.sequences_per_forward,
        training.drops_by_token,
    )
    norm = clip_gradients(training.model, config.max_grad_norm)
    # A GPU is still at work: what doesn't need its results is done before the step's one wait for them.
    stop_requested = training.worker.rank == 0 and training.job.run.stop_path.exists()
    counts, tally = gradients.counts, gradients.tally
    *shares, grad_norm = read_scalars(*tally.sums.values(), norm)
    *totals, num_stops = training.mesh.sum([*shares, float(stop_requested)])
    result = StepResult(tally.divide(totals), grad_norm, counts, stop_requested=num_stops > 0)
    if result.is_finite:
        set_learning_rate(optimizer, learning_rate(step, training.num_steps, config))
        optimizer.step()
    optimizer.zero_grad()
    training.meter.stop(counts.tokens, gradients.data_wait_s)
    return result


def measure(training: Training, step: int, result: StepResult) -> dict[str, float]:
    """Return the step's line of metrics; the rates are means since the line before."""
    return {
        "epoch": training.plan.epoch(step),
        **result.metrics,
        "learning_rate": learning_rate(step, training.num_steps, training.config),
        "grad_norm": result.grad_norm,
        "tokens": result.counts.tokens,
        "trained_tokens": result.counts.trained_tokens,
        "max_steps": training.num_steps,
        **training.meter.read(),
    }


def find_rows(training: Training, step: int) -> list[int]:
    """Return the lines of the `.jsonl` (from 0) that a step trains on."""
    return training.sequences.source_rows(np.concatenate(training.plan.microbatches(step)))


def accumulate_gradients(
    learner: Learner,
    sequences: Sequences,
    microbatches: Sequence[np.ndarray],
    step: int,
    seed: int,
    sequences_per_forward: int,
    drops_by_token: bool = True,
) -> Gradients:
    """Run this rank's share of the step's microbatches; leave the global batch's gradient on the weights.

    Of a microbatch `sequences_per_forward` are run at once. With `drops_by_token` nothing that a row drops depends on
    how many these are; only what isn't a row for each token, as attention's probabilities, is drawn for them together.

    The gradient is that of the objective's mean over the whole global batch. Nothing here waits for a GPU: while it
    computes one microbatch, the host collates the next. Collective.
    """
    model = learner.policy.model
    counts = sequences.count(np.concatenate(microbatches))
    tally = learner.start_tally(counts)
    numbers = learner.share(len(microbatches))
    is_sharded = isinstance(model, FSDPModule)
    gradient_sum = None if is_sharded else GradientSum(model, learner.mesh)
    trains_all = all(parameter.requires_grad for parameter in model.parameters())
    draws = Draws(seed, step) if drops_by_token else None
    data_wait_s = 0.0
    for i, number in enumerate(numbers):
        if not drops_by_token:
            torch.manual_seed(microbatch_seed(seed, step, len(microbatches) if number is None else number))
        whole = None if number is None else microbatches[number]
        parts = split_microbatch(whole, microbatches, sequences_per_forward, is_sharded)
        for j, rows in enumerate(parts):
            is_last = i == len(numbers) - 1 and j == len(parts) - 1
            if isinstance(model, FSDPModule):
                sync_gradients(model, is_last, trains_all)
            elif gradient_sum and is_last:
                gradient_sum.begin()
            start = time.perf_counter()
            batch = learner.collate(sequences, rows, draws)
            data_wait_s += time.perf_counter() - start
            if draws is not None:
                torch.manual_seed(draws.seed_for(np.empty(0, np.int64) if rows is None else rows))
            with drawing_from(batch.draw_keys_BT):
                output = learner.loss(batch, counts)
                (output.loss_sum / max(1, tally.denominators[LOSS])).backward()
            tally.add(output)
            # Or its graph, spread over the heap, would break up the room that the next one's activations need.
            del output
    if gradient_sum:
        gradient_sum.finish()
    return Gradients(counts, tally, data_wait_s)


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
