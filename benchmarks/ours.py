"""tunesmith's turn: its default settings, in process, without Ray.

Between the steps it times bfloat16 matrix products: the limit that the steps are measured by.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from pathlib import Path

import torch
from flops import MATRIX_SIZE, count_flops, count_product_flops, measure_shape
from in_process import lengths_of, make_job, set_up_alone
from turn import Figures, Task, age_s, read_task

from tunesmith.config import TrainConfig
from tunesmith.data.batches import Sequences
from tunesmith.data.prepare import open_prepared
from tunesmith.train.training import Training

_PRODUCTS = 3


def make_config(task: Task, data: str, home: Path, run_name: str) -> TrainConfig:
    """Return the task's settings; everything else is left at its default."""
    return TrainConfig(
        model_path=Path(task.model),
        dataset_name=data,
        input_template="{prompt}",
        output_template="{completion}",
        train_split_ratio=1.0,
        dtype="bfloat16",
        lora_rank=task.lora_rank,
        lora_alpha=task.lora_alpha,
        lora_dropout=0.0,
        max_seq_length=task.max_length,
        per_device_train_batch_size=task.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_eval_samples=0,
        max_steps=task.num_steps,
        home=home,
        run_name=run_name,
    )


def main() -> None:
    _, task = read_task()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        job = make_job(make_config(task, task.train, home, "train"), num_threads=task.num_threads)
        held_out = make_job(make_config(task, task.held_out, home, "held-out"))
        training = set_up_alone(job, torch.device("cpu"))
        training.validation = swap_tokens(training.sequences, held_out.prepared_path)
        _run(training, task).answer()


def swap_tokens(sequences: Sequences, prepared_path: Path) -> Sequences:
    """Return the training set of another prepared folder, taken just as these sequences are."""
    other = copy.copy(sequences)
    other.tokens = open_prepared(prepared_path).train
    return other


def _run(training: Training, task: Task) -> Figures:
    assert training.validation is not None
    figures = Figures(start_s=age_s())
    figures.held_out_trained_tokens = int(training.validation.tokens.num_trained.sum())
    figures.loss_before = training.evaluate()
    print(training.describe(), file=sys.stderr)
    shape = measure_shape(training.model)
    figures.product_flops_per_s += time_products()
    for step in range(1, task.num_steps + 1):
        start = time.perf_counter()
        result = training.take_step(step)
        figures.step_s.append(time.perf_counter() - start)
        lengths = lengths_of(training, step)
        figures.tokens.append(result.tokens)
        figures.trained_tokens.append(result.trained_tokens)
        figures.examples.append(len(lengths))
        figures.losses.append(result.loss)
        figures.flops.append(count_flops(shape, lengths, result.trained_tokens))
        if figures.is_halfway(task):
            figures.loss_after = training.evaluate()
        figures.product_flops_per_s += time_products()
    return figures


def time_products() -> list[float]:
    """Return the FLOP/s of some bfloat16 products of square matrices."""
    a, b = torch.ones(2, MATRIX_SIZE, MATRIX_SIZE, dtype=torch.bfloat16).normal_()
    product = a @ b
    speeds = []
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        speeds.append(count_product_flops() / (time.perf_counter() - start))
    return speeds


if __name__ == "__main__":
    main()
