"""A training that is set up: what it works with, and its verbs."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from tunesmith.config import TrainConfig
from tunesmith.data.batches import BatchPlan, GlobalBatch, Sequences
from tunesmith.data.prepare import open_prepared
from tunesmith.errors import CheckpointError
from tunesmith.machine import keep_freed_memory
from tunesmith.model.compilation import check_compiler, compile_blocks
from tunesmith.model.frozen_weights import Dense
from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.load import attention_of, load_tokenizer, resolve_dtype
from tunesmith.model.policy import Policy
from tunesmith.model.probe import keeps_examples_apart
from tunesmith.objectives.base import LOSS
from tunesmith.parallel.activation_checkpointing import count_recomputed, describe_recomputation
from tunesmith.parallel.collectives import broadcast_objects, sum_over_ranks
from tunesmith.planning.memory import sequences_per_forward
from tunesmith.runs.folder import Checkpoint, RunDir
from tunesmith.runs.metrics_log import finished_at
from tunesmith.tracking.jsonl import MetricsLog, NoLog
from tunesmith.train.build import build_model, choose_ways, describe_choices
from tunesmith.train.checkpoint import Checkpointer, Progress
from tunesmith.train.meter import Meter
from tunesmith.train.optimizer import build_optimizer
from tunesmith.train.schedule import learning_rate, set_learning_rate
from tunesmith.train.step import accumulate_gradients, clip_gradients, divide, evaluate, read_scalars
from tunesmith.train.worker import TrainJob, Worker

logger = logging.getLogger(__name__)


class Ending(NamedTuple):
    """How a training ends, and why."""

    event: Literal["finished", "stopped", "failed"]
    message: str
    setting: str = ""
    """The setting that a finished training ended at."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, or the step that could not be taken because its loss or gradient isn't finite."""

    metrics: dict[str, float]
    """The objective's, by name."""
    grad_norm: float
    tokens: int
    trained_tokens: int
    stop_requested: bool

    @property
    def loss(self) -> float:
        return self.metrics[LOSS]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class Training:
    """What the loop works with, and its verbs. All of them are collective."""

    job: TrainJob
    worker: Worker
    group: dist.ProcessGroup
    """Works on the CPU, whatever the model's device: for decisions all ranks must share."""
    model: nn.Module
    fused_loss: bool
    optimizer: Optimizer
    checkpointer: Checkpointer
    sequences: Sequences
    plan: BatchPlan
    num_steps: int
    validation: Sequences | None
    meter: Meter

    @property
    def config(self) -> TrainConfig:
        return self.job.config

    @property
    def policy(self) -> Policy:
        return Policy(self.model, self.fused_loss)

    @property
    def has_validation(self) -> bool:
        return self.validation is not None

    def close(self) -> None:
        """Give back the process groups, once nothing is being written any more."""
        self.checkpointer.close()
        dist.destroy_process_group(self.group)

    def restore(self) -> Progress:
        """Load the checkpoint that rank 0's worker is told to go on from; without one, stand at step 0.

        A run that had stopped early and is started once more gets its whole patience again.
        """
        # One choice for all ranks: a shared disk may show them different folders.
        (folder,) = broadcast_objects([self.worker.resume_from()], self.group)
        if folder is None:
            return Progress()
        progress = self.checkpointer.restore(folder)
        logger.info("going on from step %d: `%s` is the latest whole checkpoint", progress.step, folder.name)
        (finished,) = broadcast_objects([finished_at(self.job.run, progress.step)], self.group)
        return replace(progress, stopping=progress.stopping.renew()) if finished else progress

    def take_step(self, step: int) -> StepResult:
        """Train one step; a step whose loss or gradient isn't finite leaves the weights as they are."""
        config = self.config
        self.meter.start()
        microbatches = self.plan.microbatches(step)
        gradients = accumulate_gradients(
            self.policy,
            self.job.objective,
            self.sequences,
            microbatches,
            step,
            config.seed,
            self.worker,
            self.sequences_per_forward,
        )
        norm = clip_gradients(self.model, config.max_grad_norm)
        # A GPU is still at work: what doesn't need its results is done before the step's one wait for them.
        stop_requested = self.worker.rank == 0 and self.job.run.stop_path.exists()
        counts = self.sequences.count(np.concatenate(microbatches))
        *shares, grad_norm = read_scalars(*gradients.sums.values(), norm)
        *totals, num_stops = sum_over_ranks([*shares, float(stop_requested)], self.group)
        sums = dict(zip(gradients.sums, totals, strict=True))
        metrics = divide(sums, self.job.objective.denominators(counts))
        result = StepResult(metrics, grad_norm, counts.tokens, counts.trained_tokens, num_stops > 0)
        if result.is_finite:
            set_learning_rate(self.optimizer, learning_rate(step, self.num_steps, config))
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.meter.stop(counts.tokens, gradients.data_wait_s)
        return result

    @property
    def sequences_per_forward(self) -> int:
        """How many sequences of a microbatch are run at once."""
        config = self.config
        return sequences_per_forward(
            config.per_device_train_batch_size, config.max_seq_length, self.worker.device.type
        )

    def measure(self, step: int, result: StepResult) -> dict[str, float]:
        """Return the step's line of metrics; the rates are means since the line before."""
        return {
            "epoch": self.plan.epoch(step),
            **result.metrics,
            "learning_rate": learning_rate(step, self.num_steps, self.config),
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "trained_tokens": result.trained_tokens,
            "max_steps": self.num_steps,
            **self.meter.read(),
        }

    def evaluate(self) -> dict[str, float]:
        """Return the validation's metrics by name: `eval_loss`, in the objective's unit, and what else it shows."""
        assert self.validation is not None
        microbatches = choose_validation_batches(self.validation, self.config, self.worker.device.type)
        metrics = evaluate(
            self.policy, self.job.objective, self.validation, microbatches, self.worker, self.group
        )
        return {f"eval_{name}": value for name, value in metrics.items()}

    def find_ending(self, progress: Progress, stop_requested: bool) -> Ending | None:
        """Return how the training ends at this point, or None if it goes on."""
        patience = self.config.early_stopping_patience
        if progress.step >= self.num_steps:
            setting = "max_steps" if self.num_steps == self.config.max_steps else "num_train_epochs"
            return Ending("finished", f"step {progress.step} of {self.num_steps}", setting)
        if progress.stopping.is_over(patience):
            message = f"early, at step {progress.step}: no improvement in {patience} evaluations"
            return Ending("finished", message, "early_stopping_patience")
        if stop_requested:
            return Ending("stopped", f"on request, at step {progress.step} of {self.num_steps}")
        return None

    def describe_ending(self, ending: Ending, progress: Progress) -> dict[str, float | str]:
        """Return what a later attempt must know of a finished one to tell whether there is more to do."""
        if ending.event != "finished":
            return {}
        return {
            "setting": ending.setting,
            "epoch": self.plan.epoch(progress.step),
            "max_steps": self.config.max_steps,
            "early_stopping_patience": self.config.early_stopping_patience,
        }

    def publish(self, log: MetricsLog | NoLog, step: int, wait: bool) -> str | None:
        """Record and report the checkpoint that has been written since the last call, if one has.

        With `wait`, wait for it. Returns, on rank 0, what went wrong if it could not be written.
        """
        if wait:
            self.checkpointer.wait()
        outcome = self.checkpointer.take_outcome()
        checkpoint = outcome if isinstance(outcome, Checkpoint) else None
        (num_published,) = sum_over_ranks([float(checkpoint is not None)], self.group)
        if num_published:
            self.worker.report({"step": step}, checkpoint.path if checkpoint else None)
        if checkpoint is not None:
            log.event(checkpoint.step, "checkpoint", checkpoint.path.name)
        elif isinstance(outcome, CheckpointError):
            logger.error("%s; %s", outcome.message, outcome.hint)
            log.event(step, "checkpoint", f"{outcome.message}; {outcome.hint}")
            return outcome.message
        return None

    def explain_divergence(self, step: int, result: StepResult) -> Ending:
        """Return the failure of a step whose loss isn't finite, with the rows it was trained on."""
        rows = self.sequences.source_rows(np.concatenate(self.plan.microbatches(step)))
        listed = ", ".join(str(row + 1) for row in rows[:32]) + (", …" if len(rows) > 32 else "")
        return Ending(
            "failed",
            f"step {step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}; the weights are those of "
            f"step {step - 1}. Its examples are lines {listed} of training.jsonl",
        )

    def describe(self) -> str:
        """Return in one line what was chosen for this run."""
        batch = self.plan.global_batch
        rows = "packed" if self.sequences.packing else "padded"
        return (
            f"{self.num_steps} steps ({self.plan.steps_per_epoch} an epoch) of {batch.microbatches} × {batch.sequences_per_microbatch} {rows} sequences, "
            f"{self.sequences_per_forward} at a time, "
            f"on {self.worker.world_size} × {self.worker.device.type}; {describe_choices(self.model, self.fused_loss, self.config, self.worker.device)}"
        )


def set_up(job: TrainJob, worker: Worker) -> Training:
    """Load, adapt and shard the model, and plan the steps. Collective."""
    run, device = job.run, worker.device
    config = with_recorded_choices(job.config, run, worker.world_size)
    job = replace(job, config=config)
    if job.num_threads is not None:
        torch.set_num_threads(job.num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if config.torch_compile:
        check_compiler(device)
    group = dist.new_group(backend="gloo")
    prepared = open_prepared(job.prepared_path)
    tokenizer = load_tokenizer(config.model)
    model = build_model(config, device, worker.world_size, job.frozen_weight or Dense)
    fused_loss = choose_ways(config, model, device)
    packing = decide_packing(config, run, model, worker, group)
    if config.torch_compile:
        compile_blocks(model)
    attention = attention_of(model)
    flatten = attention == VARLEN or (packing and attention.startswith("flash"))
    pad_token_id = int(tokenizer.eos_token_id)
    sequences = Sequences(prepared.train, packing, pad_token_id, flatten)
    plan = BatchPlan(len(sequences), GlobalBatch(**run.read_params()["global_batch"]), config.seed)
    validation = None
    if prepared.validation is not None:
        validation = Sequences(prepared.validation, packing, pad_token_id, flatten)
    optimizer = build_optimizer(model.parameters(), config)
    return Training(
        job=job,
        worker=worker,
        group=group,
        model=model,
        fused_loss=fused_loss,
        optimizer=optimizer,
        checkpointer=Checkpointer(job, worker.rank, model, optimizer, tokenizer),
        sequences=sequences,
        plan=plan,
        num_steps=plan.total_steps(config.max_steps, config.num_train_epochs),
        validation=validation,
        meter=Meter(model, config.full_ft, device, worker.world_size),
    )


def decide_packing(
    config: TrainConfig, run: RunDir, model: nn.Module, worker: Worker, group: dist.ProcessGroup
) -> bool:
    """Return whether sequences are packed: as the run recorded, else if asked for and the model is fit for it.

    Collective. Rank 0 records it with what else was chosen, so that a resumed run keeps batches and dtype.
    """
    (params,) = broadcast_objects([run.read_params()], group)
    packing = config.packing if params["packing"] is None else bool(params["packing"])
    if packing and params["packing"] is None:
        is_fit = attention_of(model) == VARLEN or keeps_examples_apart(
            model, worker.device, resolve_dtype(config.dtype, worker.device)
        )
        (num_unfit,) = sum_over_ranks([float(not is_fit)], group)
        packing = num_unfit == 0
        if not packing:
            logger.warning(
                "`%s` lets packed examples see one another, so it is trained padded: one example a sequence",
                config.model.source,
            )
    if worker.rank == 0:
        resolved = {
            "dtype": str(resolve_dtype(config.dtype, worker.device)).removeprefix("torch."),
            "attn_implementation": attention_of(model),
            "gradient_checkpointing": describe_recomputation(*count_recomputed(model)),
            "fsdp": "full_shard" if isinstance(model, FSDPModule) else "no_shard",
            "num_workers": worker.world_size,
            "use_gpu": worker.device.type == "cuda",
        }
        run.write_params({**params, "packing": packing, "resolved": resolved})
    return packing


def with_recorded_choices(config: TrainConfig, run: RunDir, world_size: int) -> TrainConfig:
    """Return the settings with the dtype that the run was started in, where they leave it open.

    And with where the weights lay, if the number of workers is the same: how gradients are added up follows.
    """
    recorded = run.read_params()["resolved"]
    if recorded is None:
        return config
    choices = {"dtype": recorded["dtype"]}
    if recorded["num_workers"] == world_size:
        choices["fsdp"] = recorded["fsdp"]
    return config.model_copy(
        update={name: c for name, c in choices.items() if getattr(config, name) == "auto"}
    )


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
