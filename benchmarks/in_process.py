"""A training set up in this very process: alone, without Ray; and what its plan tells."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tunesmith.config import TrainConfig
from tunesmith.data.prepare import prepare
from tunesmith.model.load import load_model_config, load_tokenizer
from tunesmith.planning.fitting import make_plan
from tunesmith.planning.memory import build_planned_model
from tunesmith.planning.workers import find_workers
from tunesmith.runs.identity import locate_run
from tunesmith.train.set_up import set_up
from tunesmith.train.start import record_params
from tunesmith.train.state import Training
from tunesmith.train.worker import ProcessWorker, TrainJob


def make_job(config: TrainConfig, num_workers: int = 1, num_threads: int | None = None) -> TrainJob:
    """Prepare the data and record the run, as the driver does."""
    run = locate_run(config)
    prepared = prepare(config, load_tokenizer(config.model), run.datasets_path)
    run.path.mkdir(parents=True, exist_ok=True)
    record_params(run, config, prepared, num_workers)
    return TrainJob(config, run, prepared.folder, num_threads=num_threads)


def set_up_alone(job: TrainJob, device: torch.device) -> Training:
    """Return the training of a group of one, which is made where there is none yet."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return set_up(job, ProcessWorker(0, 1, device, job.run))


def lengths_of(training: Training, step: int) -> list[int]:
    """Return the lengths, in tokens, of the examples that a step trains on."""
    sequences = training.sequences
    examples = [example for rows in training.plan.microbatches(step) for example in sequences.examples(rows)]
    return sequences.tokens.lengths[examples].tolist()


def plan_bytes(config: TrainConfig, device: torch.device) -> int:
    """Return what `tunesmith plan` tells of the memory of a worker that has `device`, alone."""
    workers = find_workers(config, 1, use_gpu=device.type == "cuda")
    model = build_planned_model(config, load_model_config(config.model), workers.dtype)
    return make_plan(model, config, workers).memory.total
