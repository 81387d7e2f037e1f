"""A run of several data sets with weights: its validation losses, its shares, its resumption, its workers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.data_sets import SUM_TEMPLATES, SUMS, write_rows
from support.runs import losses, start, train_here, train_on_rank
from support.workers import WorkerGroup
from tunesmith.config import TrainConfig
from tunesmith.data.prepare import open_prepared
from tunesmith.model.kernels.loss import sum_cross_entropy
from tunesmith.train.set_up import set_up, tear_down
from tunesmith.train.validation import choose_parts, evaluate
from tunesmith.train.worker import ProcessWorker

pytestmark = pytest.mark.usefixtures("alone")

ModelOf = Callable[[str], Path]

TEXTS = [{"text": f"{i} is followed by {i + 1}, and {i + 1} by {i + 2}"} for i in range(50)]


def mixture(model: Path, folder: Path, home: Path, **changes: Any) -> TrainConfig:
    """Return settings of a run of 12 steps, some two and a half epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "model_path": model,
        "datasets": [
            {
                "dataset_name": write_rows(folder / "sums.jsonl", SUMS),
                "train_split_ratio": 0.8,
                "weight": 0.5,
                **SUM_TEMPLATES,
            },
            {
                "dataset_name": write_rows(folder / "texts.jsonl", TEXTS),
                "train_split_ratio": 0.8,
                "name": "prose",
                "weight": 2.0,
            },
        ],
        "home": home,
        "run_name": "run",
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",  # whatever the number of steps
        "warmup_ratio": 0,
        "lora_rank": 4,
        "max_seq_length": 128,
        "dtype": "float32",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "eval_steps": 6,
        "save_steps": 1,
        "early_stopping_patience": 0,
        "num_proc": 1,
    }
    return TrainConfig(**{**settings, **changes})


def test_a_run_that_goes_on_in_its_second_epoch_takes_the_same_steps(
    model_of: ModelOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = mixture(model_of("llama"), tmp_path / "data", tmp_path / "whole")
    with caplog.at_level(logging.INFO):
        whole = train_here(start(config))
    epochs = losses(whole, "epoch")
    middle = next(step for step, epoch in epochs.items() if 1 < epoch < 2 and epoch % 1)
    assert epochs[12] > 2, epochs
    cut = config.model_copy(update={"home": tmp_path / "cut", "max_steps": middle})
    train_here(start(cut))
    resumed = train_here(start(cut.model_copy(update={"max_steps": 12})))
    for name in ("tokens", "trained_tokens", "epoch", "loss"):
        assert losses(resumed, name) == losses(whole, name)
    # Whole and by data set, under the names of transformers.
    for step in (0, 6, 12):
        each = [losses(whole, f"eval_{name}_loss")[step] for name in ("sums", "prose")]
        assert min(each) < losses(whole, "eval_loss")[step] < max(each)
    assert (
        "step 12: validation loss " in caplog.text and "(sums " in caplog.text and ", prose " in caplog.text
    )
    shares = whole.read_params()["data"]["shares"]
    assert [(it["name"], it["weight"], it["rows"]) for it in shares] == [
        ("sums", 0.5, 24),
        ("prose", 2.0, 80),
    ]
    assert sum(it["token_share"] for it in shares) == pytest.approx(1)
    tokens = open_prepared(Path(whole.read_params()["data"]["folder"])).train
    of_prose = int(tokens.lengths[tokens.dataset_ids == 1].sum()) * 2
    assert shares[1]["tokens"] == of_prose


@pytest.mark.parametrize("changes", [{}, {"packing": False}, {"max_eval_samples": 6}], ids=str)
def test_the_whole_validation_loss_is_that_of_its_examples_one_by_one(
    changes: dict[str, Any], model_of: ModelOf, tmp_path: Path
) -> None:
    job = start(mixture(model_of("llama"), tmp_path, tmp_path / "home", **changes))
    training = set_up(job, ProcessWorker(0, 1, torch.device("cpu"), job.run))
    assert training.validation is not None
    metrics = evaluate(training, training.validation)
    sums, counts = np.zeros(2), np.zeros(2)
    for part in choose_parts(training.validation, job.config, "cpu"):
        for rows in part.microbatches:
            for example in part.sequences.examples(rows):
                alone = replace_packing(training.validation).collate(np.array([example]))
                dataset_id = int(training.validation.tokens.dataset_ids[example])
                with torch.no_grad():
                    sums[dataset_id] += float(sum_cross_entropy(training.model.eval(), alone))
                counts[dataset_id] += len(alone.targets_N)
    tear_down(training)
    assert metrics["eval_loss"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)
    assert metrics["eval_sums_loss"] == pytest.approx(sums[0] / counts[0], rel=1e-5)
    assert metrics["eval_prose_loss"] == pytest.approx(sums[1] / counts[1], rel=1e-5)


def replace_packing(sequences: Any) -> Any:
    return type(sequences)(sequences.tokens, False, sequences.pad_token_id)


def test_a_single_data_set_has_its_validation_loss_alone(model_of: ModelOf, tmp_path: Path) -> None:
    data = {
        "dataset_name": write_rows(tmp_path / "texts.jsonl", TEXTS),
        "name": "prose",
        "train_split_ratio": 0.8,
    }
    run = train_here(
        start(mixture(model_of("llama"), tmp_path, tmp_path / "home", datasets=[data], max_steps=1))
    )
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert {name for line in lines for name in line if name.startswith("eval_")} == {"eval_loss"}
    assert "shares" not in run.read_params()["data"]


@pytest.mark.slow
def test_two_workers_train_a_mixture_as_one(
    model_of: ModelOf, tmp_path: Path, two_workers: WorkerGroup
) -> None:
    settings = {"gradient_accumulation_steps": 3, "learning_rate": 1e-3, "lora_dropout": 0, "save_steps": 0}
    jobs = [
        start(mixture(model_of("llama"), tmp_path / "data", tmp_path / name, **settings))
        for name in ("one", "two")
    ]
    first, second = train_here(jobs[0]), two_workers.run(train_on_rank, replace(jobs[1]))[0]
    assert losses(first, "tokens") == losses(second, "tokens")
    for name in ("loss", "eval_loss", "eval_sums_loss", "eval_prose_loss"):
        assert losses(first, name) == pytest.approx(losses(second, name), rel=1e-4), name
