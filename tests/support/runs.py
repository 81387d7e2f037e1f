"""Small whole training runs, without Ray: what the tests of the loop train."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tunesmith.config import TrainConfig
from tunesmith.data.prepare import prepare_run
from tunesmith.model.adapters.new_tokens import load_run_tokenizer
from tunesmith.model.adapters.prior import with_prior_settings
from tunesmith.runs.folder import RunDir
from tunesmith.runs.identity import locate_run
from tunesmith.runs.metrics_log import find_ending, iterate_metrics
from tunesmith.train.loop import train
from tunesmith.train.start import record_params
from tunesmith.train.worker import ProcessWorker, TrainJob


def write_rows(path: Path, num_rows: int = 60, seed: int = 0) -> Path:
    """Write sums in words as a data set of `question` and `answer`."""
    numbers = random.Random(seed)
    with path.open("w") as file:
        for i in range(num_rows):
            a, b = numbers.randint(0, 99), numbers.randint(0, 99)
            row = {
                "question": f"({i}) {a} plus {b}?" + " please" * numbers.randint(0, 4),
                "answer": str(a + b),
            }
            file.write(json.dumps(row) + "\n")
    return path


def small_config(model_path: Path | str, data: Path | str, home: Path, **changes: Any) -> TrainConfig:
    """Return settings for a run of seconds: four steps of four microbatches, float32."""
    settings: dict[str, Any] = {
        "model_path": model_path,
        "dataset_name": str(data),
        "field_mapping": {"instruction": "question", "output": "answer"},
        "input_template": "{instruction} ",
        "output_template": "{output}",
        "home": home,
        "run_name": "run",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "max_seq_length": 96,
        "dtype": "float32",
        "gradient_checkpointing": False,  # left open, a third of such a run's time goes into its choice
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
        "num_proc": 1,
    }
    return TrainConfig(**{**settings, **changes})


def start(config: TrainConfig, num_workers: int = 1) -> TrainJob:
    """Prepare the data and record the run, as the driver does."""
    config = with_prior_settings(config)
    run = locate_run(config)
    prepared = prepare_run(config, load_run_tokenizer(config), run)
    run.path.mkdir(parents=True, exist_ok=True)
    record_params(run, config, prepared, num_workers)
    return TrainJob(config, run, prepared.folder, num_threads=1)


def train_here(job: TrainJob) -> RunDir:
    """Train in this process, alone in its group."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return train_on_rank(0, 1, job)


def train_on_rank(rank: int, world_size: int, job: TrainJob) -> RunDir:
    """Train as one rank of a group that exists already."""
    train(job, ProcessWorker(rank, world_size, torch.device("cpu"), job.run))
    return job.run


def copy_run(run: RunDir, home: Path) -> RunDir:
    """Copy a run that several tests share, without its evaluations, for a test that changes it."""
    shutil.copytree(run.home, home, ignore=shutil.ignore_patterns("evaluation"))
    return RunDir(home, run.results_dir, run.model_name, run.run_name)


def losses(run: RunDir, key: str = "loss") -> dict[int, float]:
    """Return a column of the run's metrics by step, the last line of each step."""
    return {line["step"]: float(line[key]) for line in iterate_metrics(run.metrics_path) if key in line}


def ending_of(run: RunDir) -> str | None:
    """Return how the newest attempt ended: finished, stopped, failed, or None."""
    ending = find_ending(run)
    return ending["event"] if ending else None


def events(run: RunDir, event: str) -> list[dict[str, Any]]:
    """Return the lines of metrics that hold this event, in order."""
    return [line for line in iterate_metrics(run.metrics_path) if line.get("event") == event]


def last_event(run: RunDir, event: str) -> dict[str, Any]:
    return events(run, event)[-1]
