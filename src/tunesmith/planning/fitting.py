"""How a run lies in its workers' memory, and the smallest change of its settings that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.config import TrainConfig
from tunesmith.parallel.fsdp import FULL, HYBRID
from tunesmith.planning.layout import plan_layout
from tunesmith.planning.memory import Layout, Memory, PlannedModel
from tunesmith.planning.workers import Workers

_SHORTEST_ROW = 256
_MOST_TIMES_WORKERS = 8


@dataclass(frozen=True)
class Plan:
    """A run's settings and workers, how it lies in their memory, and what each worker needs."""

    config: TrainConfig
    workers: Workers
    layout: Layout
    memory: Memory

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.workers.memory


def make_plan(model: PlannedModel, config: TrainConfig, workers: Workers) -> Plan:
    """Return what `model` needs with these settings."""
    layout, memory = plan_layout(
        model, config, workers.device_type, workers.num, workers.memory, workers.num_equal_nodes
    )
    return Plan(config, workers, layout, memory)


def find_fitting(model: PlannedModel, planned: Plan) -> Plan | None:
    """Return the plan with the smallest change that fits, or None."""
    for config, num_workers in _smaller_settings(planned.config, planned.workers):
        changed = make_plan(model, config, replace(planned.workers, num=num_workers))
        if changed.fits:
            return changed
    return None


def _smaller_settings(config: TrainConfig, workers: Workers) -> Iterator[tuple[TrainConfig, int]]:
    """Yield settings and numbers of workers that need less and less, those first that change the result least."""
    num_workers = workers.num
    on_gpu = workers.device_type == "cuda"

    def change(**changes: Any) -> TrainConfig:
        return config.model_copy(update=changes)

    if config.gradient_checkpointing is False:
        config = change(gradient_checkpointing=None)
        yield config, num_workers
    # CPUs run few sequences of a microbatch at once.
    while on_gpu and config.per_device_train_batch_size > 1 and config.per_device_train_batch_size % 2 == 0:
        config = change(
            per_device_train_batch_size=config.per_device_train_batch_size // 2,
            gradient_accumulation_steps=config.gradient_accumulation_steps * 2,
        )
        yield config, num_workers
    if num_workers > 1 and config.fsdp != FULL and (config.fsdp == HYBRID or not config.full_ft):
        config = change(fsdp=FULL)
        yield config, num_workers
    while workers.imagined and num_workers < _MOST_TIMES_WORKERS * workers.num:
        num_workers *= 2
        config = change(gradient_accumulation_steps=max(1, config.gradient_accumulation_steps // 2))
        yield config, num_workers
    while config.max_seq_length >= 2 * _SHORTEST_ROW:
        config = change(max_seq_length=config.max_seq_length // 2)
        yield config, num_workers
    if on_gpu and not config.cpu_offload:
        yield change(cpu_offload=True), num_workers
