"""From a job to a training that can take its first step: a list of visible calls."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
import torch.distributed as dist

from tunesmith.compat import let_segments_grow
from tunesmith.data.batches import BatchPlan, GlobalBatch, Sequences
from tunesmith.data.epochs import plan_epochs
from tunesmith.data.prepare import open_prepared
from tunesmith.machine import keep_freed_memory
from tunesmith.model.adapters.new_tokens import load_run_tokenizer
from tunesmith.model.adapters.prior import with_kept_adapter
from tunesmith.model.attention_choice import is_flash
from tunesmith.model.compilation import check_compiler, compile_blocks, keep_compiled
from tunesmith.model.frozen_weights import Dense
from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.load import attention_of
from tunesmith.model.policy import Policy
from tunesmith.parallel.collectives import broadcast_objects
from tunesmith.parallel.mesh import build_mesh
from tunesmith.planning.memory import sequences_per_forward
from tunesmith.runs.identity import drops_by_token
from tunesmith.train.build import build_model, choose_ways
from tunesmith.train.checkpoint import Checkpointer, build_stager
from tunesmith.train.choices import (
    check_sharding,
    choose_kernels,
    choose_packing,
    find_choices,
    keep_recorded,
    record_choices,
)
from tunesmith.train.learner import Learner
from tunesmith.train.meter import Meter
from tunesmith.train.optimizer import build_optimizer
from tunesmith.train.shortage import factor_after_shortages
from tunesmith.train.state import Training
from tunesmith.train.worker import TrainJob, Worker

# What a user sets of the allocator stays: torch's names for it, the second since 2.9.
_ALLOCATOR_VARIABLES = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


def set_up(job: TrainJob, worker: Worker) -> Training:
    """Load, adapt and shard the model, and plan the steps. Collective."""
    device = worker.device
    prepare_process(job.num_threads, device)
    mesh = build_mesh(worker.rank, worker.world_size)
    params, factor = broadcast_objects([job.run.read_params(), factor_after_shortages(job.run)], mesh.group)
    config = with_kept_adapter(job.config, job.run)
    config = keep_recorded(config, params["resolved"], mesh, device.type == "cuda")
    check_sharding(config, mesh)
    job = replace(job, config=config)
    if config.torch_compile:
        check_compiler(device)
        keep_compiled(job.run.compiled_path)
    prepared = open_prepared(job.prepared_path)
    tokenizer = load_run_tokenizer(config)
    kernels = choose_kernels(params["resolved"], device.type)
    model = build_model(
        config,
        device,
        mesh,
        job.frozen_weight or Dense,
        kernels,
        drops_by_token=drops_by_token(params),
        needed=factor,
    )
    policy = Policy(model, fused_loss=choose_ways(config, model, device))
    packing = choose_packing(config, params["packing"], model, mesh, device)
    if worker.rank == 0:
        record_choices(job.run, packing, find_choices(config, model, mesh, device, kernels))
    if config.torch_compile:
        compile_blocks(model)
    attention = attention_of(model)
    flatten = attention == VARLEN or (packing and is_flash(attention))
    pad_token_id = int(tokenizer.eos_token_id)
    epochs = plan_epochs(prepared.train, config, packing)
    sequences = Sequences(prepared.train, packing, pad_token_id, flatten, epochs)
    validation = None
    if prepared.validation is not None:
        validation = Sequences(prepared.validation, packing, pad_token_id, flatten)
    plan = BatchPlan(len(sequences), GlobalBatch(**params["global_batch"]), config.seed, epochs)
    optimizer = build_optimizer(model.parameters(), config)
    return Training(
        job=job,
        worker=worker,
        learner=Learner(policy, job.objective, mesh, device),
        optimizer=optimizer,
        checkpointer=Checkpointer(job, worker.rank, model, optimizer, tokenizer, build_stager(device.type)),
        sequences=sequences,
        sequences_per_forward=sequences_per_forward(
            config.per_device_train_batch_size, config.max_seq_length, device.type
        ),
        drops_by_token=drops_by_token(params),
        plan=plan,
        num_steps=plan.total_steps(config.max_steps, config.num_train_epochs),
        validation=validation,
        meter=Meter(model, config.full_ft, device, mesh.size),
    )


def tear_down(training: Training) -> None:
    """Give back the process groups, once nothing is being written any more. Collective."""
    training.checkpointer.close()
    dist.destroy_process_group(training.mesh.group)


def prepare_process(num_threads: int | None, device: torch.device) -> None:
    """Let this process compute on `device`, with so many threads (None: torch's choice)."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
            let_segments_grow()
    else:
        keep_freed_memory()
