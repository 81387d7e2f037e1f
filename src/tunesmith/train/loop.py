"""The training loop: `train(job, worker)` reads from top to bottom."""

from __future__ import annotations

from tunesmith.runs.metrics_log import newest_attempt
from tunesmith.tracking.jsonl import MetricsLog, NoLog
from tunesmith.tracking.trackers import open_trackers
from tunesmith.train.checkpoint import Progress
from tunesmith.train.training import Ending, set_up
from tunesmith.train.worker import TrainJob, Worker


def train(job: TrainJob, worker: Worker) -> None:
    """Train from the run's last checkpoint to its end. Collective: every worker of the group runs it.

    How it ended stands in the run folder's metrics: an event `finished`, `stopped` or `failed`.
    """
    config = job.config
    training = set_up(job, worker)
    progress = training.restore()
    first_step = progress.step + 1
    log = open_log(job, worker, progress.step)
    try:
        log.event(progress.step, "start", training.describe())
        if progress.step == 0 and training.has_validation:
            log.evaluation(0, training.evaluate())
        ending = training.find_ending(progress, stop_requested=False)
        while ending is None:
            step = progress.step + 1
            result = training.take_step(step)
            if not result.is_finite:
                ending = training.explain_divergence(step, result)
                training.publish(log, step, wait=True)  # the last good checkpoint may still be on its way
                break
            is_logged = is_due(step, config.logging_steps) or step in (first_step, training.num_steps)
            if is_logged or result.stop_requested:
                log.training(step, training.measure(step, result))
            before, progress = progress, Progress(step, stopping=progress.stopping)
            if training.has_validation and (step == training.num_steps or is_due(step, config.eval_steps)):
                metrics = training.evaluate()
                progress = progress.observe(metrics["eval_loss"], config.early_stopping_threshold)
                log.evaluation(step, metrics)
            ending = training.find_ending(progress, result.stop_requested)
            is_best = progress.stopping.best_loss != before.stopping.best_loss
            if ending or is_best or is_due(step, config.save_steps):
                training.publish(log, step, wait=True)  # what became of the save before this one
                training.checkpointer.save(progress)
            failure = training.publish(log, step, wait=ending is not None)
            ending = Ending("failed", failure) if ending and failure else ending
        log.event(progress.step, ending.event, ending.message, **training.describe_ending(ending, progress))
        training.close()
    finally:
        log.close()


def open_log(job: TrainJob, worker: Worker, start_step: int) -> MetricsLog | NoLog:
    """Return what this rank records into: everything on rank 0, nothing on the others."""
    if worker.rank != 0:
        return NoLog()
    attempt = newest_attempt(job.run) + 1
    return MetricsLog(job.run.metrics_path, attempt, open_trackers(job.run, job.config, start_step))


def is_due(step: int, interval: int) -> bool:
    """Return whether something that happens every `interval` steps (0: never) happens at `step`."""
    return interval > 0 and step % interval == 0
