"""The loss and the metrics of the validation set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch

from tunesmith.config import TrainConfig
from tunesmith.config.data import name_data_sets
from tunesmith.data.batches import Counts, Sequences
from tunesmith.data.packing import pack_examples
from tunesmith.data.token_set import Packs
from tunesmith.parallel.fsdp import release_gathered
from tunesmith.planning.memory import sequences_per_forward
from tunesmith.train.learner import read_scalars
from tunesmith.train.state import Training


@dataclass(frozen=True)
class Part:
    """The sequences of one data set, or all where the validation set is of a single one; `name` is None then."""

    name: str | None
    sequences: Sequences
    microbatches: list[np.ndarray]

    def count(self) -> Counts:
        return self.sequences.count(np.concatenate(self.microbatches))


@torch.no_grad()
def evaluate(training: Training, validation: Sequences) -> dict[str, float]:
    """Return the objective's metrics over all ranks, by name: `eval_loss`, and whatever else it shows.

    Where the set is of several data sets, those of each besides, as `eval_NAME_loss`. NaN where there is nothing to
    divide by. Collective. Leaves the model in training mode.
    """
    learner, model = training.learner, training.model.eval()
    parts = choose_parts(validation, training.config, learner.device.type)
    of_parts = [part.count() for part in parts]
    counts = Counts(*map(sum, zip(*map(astuple, of_parts), strict=True)))
    tallies = [learner.start_tally(of_part) for of_part in of_parts]
    # Of all parts together: no rank waits at the end of each.
    work = [(i, rows) for i, part in enumerate(parts) for rows in part.microbatches]
    for number in learner.share(len(work)):
        i, rows = (0, None) if number is None else work[number]
        batch = learner.collate(parts[i].sequences, rows)
        tallies[i].add(learner.loss(batch, counts))
    model.train()
    release_gathered(model)
    sums = learner.mesh.sum(read_scalars(*(value for tally in tallies for value in tally.sums.values())))
    totals = np.array(sums).reshape(len(parts), -1)
    whole = replace(tallies[0], denominators=learner.objective.denominators(counts))
    metrics = {f"eval_{name}": value for name, value in whole.divide(totals.sum(axis=0).tolist()).items()}
    if len(parts) > 1:
        for part, tally, of_part in zip(parts, tallies, totals.tolist(), strict=True):
            metrics |= {f"eval_{part.name}_{name}": value for name, value in tally.divide(of_part).items()}
    return metrics


def choose_parts(validation: Sequences, config: TrainConfig, device_type: str) -> list[Part]:
    """Return the microbatches of `choose_validation_batches`, or of the same examples packed by data set."""
    microbatches = choose_validation_batches(validation, config, device_type)
    examples = np.array(validation.examples(np.concatenate(microbatches)))
    # A set of one's own counts as its data set's.
    numbers = np.arange(len(config.sources))
    for dataset_id, own in enumerate(config.own_sets, start=len(config.data_sets)):
        numbers[dataset_id] = dataset_id if own.number is None else own.number
    ids = numbers[validation.tokens.dataset_ids[examples]]
    if len(np.unique(ids)) == 1:
        return [Part(None, validation, microbatches)]
    names, size = name_data_sets(config.sources), len(microbatches[0])
    parts = []
    for dataset_id in np.unique(ids).tolist():
        own = examples[ids == dataset_id]
        sequences, chosen = validation, own
        if validation.packing:
            tokens = validation.tokens
            pack_tokens = tokens.num_segments * config.max_seq_length
            order, bounds = pack_examples(tokens.lengths[own], pack_tokens, config.seed)
            sequences = validation.repack(Packs(own[order], bounds))
            chosen = np.arange(len(sequences))
        parts.append(Part(names[dataset_id], sequences, [*_cut(chosen, size)]))
    return parts


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
    return [*_cut(np.array(chosen), size)]


def _cut(chosen: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (chosen[i : i + size] for i in range(0, len(chosen), size))
