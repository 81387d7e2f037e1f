"""The training loop: `train(job, worker)` reads from top to bottom."""

from __future__ import annotations

from tunesmith.runs.metrics_log import newest_attempt
from tunesmith.tracking.jsonl import MetricsLog, NoLog
from tunesmith.tracking.trackers import open_trackers
from tunesmith.train.checkpoint import Progress
from tunesmith.train.decisions import (
    Ending,
    describe_ending,
    explain_divergence,
    find_ending,
    is_evaluated,
    is_logged,
    is_saved,
)
from tunesmith.train.profiling import open_profiler
from tunesmith.train.saving import publish, restore
from tunesmith.train.set_up import set_up, tear_down
from tunesmith.train.step import find_rows, measure, take_step
from tunesmith.train.validation import evaluate
from tunesmith.train.worker import TrainJob, Worker


def train(job: TrainJob, worker: Worker) -> None:
    """Train from the run's last checkpoint to its end. Collective: every worker of the group runs it.

    How it ended stands in the run folder's metrics: an event `finished`, `stopped` or `failed`.
    """
    training = set_up(job, worker)
    config, num_steps = training.config, training.num_steps
    progress = restore(training)
    first_step = progress.step + 1
    profiler = open_profiler(job, worker, progress.step, num_steps)
    log = open_log(job, worker, progress.step)
    try:
        log.event(progress.step, "start", training.describe())
        if progress.step == 0 and training.validation is not None:
            log.evaluation(0, evaluate(training, training.validation))
        ending = find_ending(progress, num_steps, config)
        while ending is None:
            step = progress.step + 1
            profiler.announce(step)
            result = take_step(training, step)
            if not result.is_finite:
                ending = explain_divergence(step, result.loss, result.grad_norm, find_rows(training, step))
                publish(training, log, step, wait=True)  # the last good checkpoint may still be on its way
                break
            if is_logged(step, first_step, num_steps, config) or result.stop_requested:
                log.training(step, measure(training, step, result))
            before, progress = progress, Progress(step, stopping=progress.stopping)
            if training.validation is not None and is_evaluated(step, num_steps, config):
                metrics = evaluate(training, training.validation)
                progress = progress.observe(metrics["eval_loss"], config.early_stopping_threshold)
                log.evaluation(step, metrics)
            ending = find_ending(progress, num_steps, config, result.stop_requested)
            if is_saved(progress, before, ending, config):
                publish(training, log, step, wait=True)  # what became of the save before this one
                training.checkpointer.save(progress)
            failure = publish(training, log, step, wait=ending is not None)
            ending = Ending("failed", failure) if ending and failure else ending
        details = describe_ending(ending, training.plan.epoch(progress.step), config)
        log.event(progress.step, ending.event, ending.message, **details)
        tear_down(training)
    finally:
        log.close()
        profiler.close()


def open_log(job: TrainJob, worker: Worker, start_step: int) -> MetricsLog | NoLog:
    """Return what this rank records into: everything on rank 0, nothing on the others."""
    if worker.rank != 0:
        return NoLog()
    attempt = newest_attempt(job.run) + 1
    return MetricsLog(job.run.metrics_path, attempt, open_trackers(job.run, job.config, start_step))
