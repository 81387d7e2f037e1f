"""The loss and the metrics of the validation set."""

from __future__ import annotations

import math

import numpy as np
import torch

from tunesmith.config import TrainConfig
from tunesmith.data.batches import Sequences
from tunesmith.parallel.fsdp import release_gathered
from tunesmith.planning.memory import sequences_per_forward
from tunesmith.train.learner import read_scalars
from tunesmith.train.state import Training


@torch.no_grad()
def evaluate(training: Training, validation: Sequences) -> dict[str, float]:
    """Return the objective's metrics over all ranks, by name: `eval_loss`, and whatever else it shows.

    NaN where there is nothing to divide by. Collective. Leaves the model in training mode.
    """
    learner, model = training.learner, training.model.eval()
    microbatches = choose_validation_batches(validation, training.config, learner.device.type)
    counts = validation.count(np.concatenate(microbatches))
    tally = learner.start_tally(counts)
    for number in learner.share(len(microbatches)):
        batch = learner.collate(validation, None if number is None else microbatches[number])
        tally.add(learner.loss(batch, counts))
    model.train()
    release_gathered(model)
    metrics = tally.divide(learner.mesh.sum(read_scalars(*tally.sums.values())))
    return {f"eval_{name}": value for name, value in metrics.items()}


def choose_validation_batches(
    validation: Sequences, config: TrainConfig, device_type: str
) -> list[np.ndarray]:
    """Return microbatches of the first sequences that together hold at most `max_eval_samples` examples."""
    count, limit = 0, config.max_eval_samples or math.inf
    chosen: list[int] = []
    for index in range(len(validation)):
        count += len(validation.examples(np.array([index])))
        if count > limit and chosen:
            break
        chosen.append(index)
    size = sequences_per_forward(config.per_device_eval_batch_size, config.max_seq_length, device_type)
    return [np.array(chosen[i : i + size]) for i in range(0, len(chosen), size)]
