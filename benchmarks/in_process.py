"""A training set up in this very process: alone, without Ray; and what its plan tells."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
import torch.distributed as dist
from flops import count_product_flops

from tunesmith.config import TrainConfig
from tunesmith.data.batches import Sequences
from tunesmith.data.prepare import open_prepared, prepare
from tunesmith.model.load import load_model_config, load_tokenizer
from tunesmith.planning.fitting import Plan, make_plan
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
    """Return the training of a group of one."""
    stay_alone()
    return set_up(job, ProcessWorker(0, 1, device, job.run))


def stay_alone() -> None:
    """Make a group of one, where there is no group yet."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)


def set_up_in_group(
    rank: int, num_workers: int, folder: Path, job: TrainJob, device: torch.device
) -> Training:
    """Return the training of one of several processes, which meet in `folder`."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(folder / "store"), num_workers)
    dist.init_process_group(_backend(), store=store, rank=rank, world_size=num_workers)
    return set_up(job, ProcessWorker(rank, num_workers, device, job.run))


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def lengths_of(training: Training, step: int) -> list[int]:
    """Return the lengths, in tokens, of the examples that a step trains on."""
    sequences = training.sequences
    examples = [example for rows in training.plan.microbatches(step) for example in sequences.examples(rows)]
    return sequences.tokens.lengths[examples].tolist()


def swap_tokens(sequences: Sequences, prepared_path: Path) -> Sequences:
    """Return the training set of another prepared folder, taken just as these sequences are."""
    other = copy.copy(sequences)
    other.tokens = open_prepared(prepared_path).train
    return other


def plan(config: TrainConfig, device: torch.device) -> Plan:
    """Return what `tunesmith plan` tells of a worker that has `device`, alone."""
    workers = find_workers(config, 1, use_gpu=device.type == "cuda")
    model = build_planned_model(config, load_model_config(config.model), workers.dtype)
    return make_plan(model, config, workers)


def time_products(size: int, num_products: int, device: torch.device) -> list[float]:
    """Return the FLOP/s of some bfloat16 products of square matrices, after one that isn't timed."""
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=device)
    product = a @ b
    speeds = []
    for _ in range(num_products):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        synchronize(device)
        speeds.append(count_product_flops(size) / (time.perf_counter() - start))
    return speeds


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been given to do; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
