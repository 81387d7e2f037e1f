"""What all ranks do together about checkpoints besides writing them: go on from one, tell of one."""

from __future__ import annotations

import logging
from dataclasses import replace

from tunesmith.errors import CheckpointError
from tunesmith.parallel.collectives import broadcast_objects
from tunesmith.runs.folder import Checkpoint
from tunesmith.runs.metrics_log import finished_at
from tunesmith.tracking.jsonl import MetricsLog, NoLog
from tunesmith.train.checkpoint import Progress
from tunesmith.train.state import Training

logger = logging.getLogger(__name__)


def restore(training: Training) -> Progress:
    """Load the checkpoint that rank 0's worker is told to go on from; without one, stand at step 0. Collective.

    A run that had stopped early and is started once more gets its whole patience again.
    """
    group = training.mesh.group
    # One choice for all ranks: a shared disk may show them different folders.
    (folder,) = broadcast_objects([training.worker.resume_from()], group)
    if folder is None:
        return Progress()
    progress = training.checkpointer.restore(folder)
    logger.info("going on from step %d: `%s` is the latest whole checkpoint", progress.step, folder.name)
    (finished,) = broadcast_objects([finished_at(training.job.run, progress.step)], group)
    return replace(progress, stopping=progress.stopping.renew()) if finished else progress


def publish(training: Training, log: MetricsLog | NoLog, step: int, wait: bool) -> str | None:
    """Record and report the checkpoint that has been written since the last call, if one has. Collective.

    With `wait`, wait for it. Returns, on rank 0, what went wrong if it could not be written.
    """
    if wait:
        training.checkpointer.wait()
    outcome = training.checkpointer.take_outcome()
    checkpoint = outcome if isinstance(outcome, Checkpoint) else None
    (num_published,) = training.mesh.sum([float(checkpoint is not None)])
    if num_published:
        training.worker.report({"step": step}, checkpoint.path if checkpoint else None)
    if checkpoint is not None:
        log.event(checkpoint.step, "checkpoint", checkpoint.path.name)
    elif isinstance(outcome, CheckpointError):
        logger.error("%s; %s", outcome.message, outcome.hint)
        log.event(step, "checkpoint", f"{outcome.message}; {outcome.hint}")
        return outcome.message
    return None
