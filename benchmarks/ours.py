"""tunesmith's turn: its default settings, or those without one lever, in process, without Ray.

Between the steps it times bfloat16 matrix products: the limit that the steps are measured by.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flops import MATRIX_SIZE, count_flops, measure_shape
from in_process import lengths_of, make_job, plan, set_up_alone, swap_tokens, time_products
from turn import Figures, Task, age_s, read_task

from tunesmith.compat import has_bfloat16_instructions
from tunesmith.config import TrainConfig
from tunesmith.data import batches
from tunesmith.data.batches import Sequences
from tunesmith.model.kernels import install
from tunesmith.planning import memory
from tunesmith.train import build, set_up, validation
from tunesmith.train.state import Training
from tunesmith.train.step import take_step
from tunesmith.train.validation import evaluate

_CPU = torch.device("cpu")
_PRODUCTS = 3
# A processor without instructions for bfloat16 takes a minute for a large one.
_MATRIX_SIZE = MATRIX_SIZE if has_bfloat16_instructions() else 256

# What makes training fast, by name: the settings and the replaced parts that leave it out.
LEVERS: dict[str, tuple[dict[str, Any], list[tuple[Any, str, Any]]]] = {
    "attention within examples": ({"attn_implementation": "sdpa"}, []),
    "loss without whole logits": ({}, [(build, "fuses_loss", lambda *_: False)]),
    "adapters computed with their layers, weights not sharded": (
        {},
        [
            (install, "CPU", replace(install.CPU, fuses_adapters=False)),
            (memory, "trains_plain_adapters_alone", lambda _: False),
        ],
    ),
    "norms and gates that keep less": (
        {},
        [(install, "CPU", replace(install.CPU, fuses_elementwise=False))],
    ),
    "several sequences at a time": (
        {},
        [(module, "sequences_per_forward", lambda *_: 1) for module in (set_up, validation)],
    ),
    "at most 1,024 tokens at a time": (
        {},
        [(module, "sequences_per_forward", lambda size, *_: size) for module in (set_up, validation)],
    ),
    "cheap results computed again": (
        {},
        [(install, "CPU", replace(install.CPU, keeps_cheap_results=True))],
    ),
    "freed memory kept": ({}, [(set_up, "keep_freed_memory", lambda: None)]),
    "rows of few lengths": ({}, [(batches, "FLAT_MULTIPLE", 1)]),
    "no activation checkpointing": ({"gradient_checkpointing": True}, []),
    "no compiled blocks": ({"torch_compile": True}, []),
}


def make_config(task: Task, data: str, home: Path, run_name: str, **changes: Any) -> TrainConfig:
    """Return the task's settings, with these changes; everything else is left at its default."""
    settings: dict[str, Any] = {
        "model_path": Path(task.model),
        "dataset_name": data,
        "input_template": "{prompt}",
        "output_template": "{completion}",
        "train_split_ratio": 1.0,
        "dtype": "bfloat16",
        "lora_rank": task.lora_rank,
        "lora_alpha": task.lora_alpha,
        "lora_dropout": 0.0,
        "max_seq_length": task.max_length,
        "per_device_train_batch_size": task.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "max_eval_samples": 0,
        "max_steps": task.num_steps,
        "home": home,
        "run_name": run_name,
    }
    return TrainConfig(**{**settings, **changes})


def main() -> None:
    variant, task = read_task()
    changes = {} if variant == "default" else leave_out(variant)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        config = make_config(task, task.train, home, "train", **changes)
        job = make_job(config, num_threads=task.num_threads)
        held_out = make_job(make_config(task, task.held_out, home, "held-out"))
        ours = set_up_alone(job, _CPU)
        held_out_rows = swap_tokens(ours.sequences, held_out.prepared_path)
        figures = _run(ours, held_out_rows, task)
        figures.planned_bytes = plan(config, _CPU).memory.total
        figures.answer()


def leave_out(lever: str) -> dict[str, Any]:
    """Let this process train without one of `LEVERS`; return the settings that it needs besides."""
    settings, patches = LEVERS[lever]
    for module, name, replacement in patches:
        setattr(module, name, replacement)
    return settings


def _run(ours: Training, held_out: Sequences, task: Task) -> Figures:
    figures = Figures(start_s=age_s())
    figures.held_out_trained_tokens = int(held_out.tokens.num_trained.sum())
    figures.loss_before = evaluate(ours, held_out)["eval_loss"]
    print(ours.describe(), file=sys.stderr)
    shape = measure_shape(ours.model)
    figures.product_flops_per_s += time_products(_MATRIX_SIZE, _PRODUCTS, _CPU)
    for number in range(1, task.num_steps + 1):
        start = time.perf_counter()
        result = take_step(ours, number)
        figures.step_s.append(time.perf_counter() - start)
        lengths = lengths_of(ours, number)
        figures.tokens.append(result.counts.tokens)
        figures.trained_tokens.append(result.counts.trained_tokens)
        figures.examples.append(len(lengths))
        figures.losses.append(result.loss)
        figures.flops.append(count_flops(shape, lengths, result.counts.trained_tokens))
        if figures.is_halfway(task):
            figures.loss_after = evaluate(ours, held_out)["eval_loss"]
        figures.product_flops_per_s += time_products(_MATRIX_SIZE, _PRODUCTS, _CPU)
    return figures


if __name__ == "__main__":
    main()
