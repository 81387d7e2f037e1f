"""Whether the device trains as the CPU does: a tiny model in bfloat16 there, beside float32 here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from in_process import make_job, set_up_alone, set_up_in_group, stay_alone

from gpu_parts.bench import Bench, Figures, Work, make_config
from gpu_parts.shapes import WIDE_HEADS, WINDOWED, mixed_lengths, write_model, write_rows
from tunesmith.config import TrainConfig
from tunesmith.model.load import attention_of
from tunesmith.train.set_up import tear_down
from tunesmith.train.state import Training
from tunesmith.train.step import take_step
from tunesmith.train.validation import evaluate
from tunesmith.train.worker import TrainJob

TOLERANCE = 0.02
_CPU = torch.device("cpu")
_STEPS = 3
_LONGEST = 64
_TOKENS = 800


@dataclass(frozen=True)
class Case:
    """A way to train: a shape, and settings."""

    shape: dict[str, Any] = field(default_factory=lambda: WIDE_HEADS)
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "LoRA, grouped heads of 128": Case(),
    "dropout": Case(settings={"lora_dropout": 0.1}),
    "recomputed blocks": Case(settings={"gradient_checkpointing": True}),
    "sliding windows": Case(WINDOWED),
    "padded": Case(settings={"packing": False, "attn_implementation": "sdpa"}),
    "full fine-tuning": Case(settings={"full_ft": True, "learning_rate": 1e-3, "min_learning_rate": 1e-4}),
}
_LAYOUTS = {"LoRA, grouped heads of 128", "padded"}


def compare_with_cpu(bench: Bench) -> Iterator[Work]:
    yield "all_reduce", partial(_sum_over_group, bench)
    found: dict[str, Figures] = {}
    for name, case in CASES.items():
        yield name, partial(_compare, bench, name, case, found)
    if found.keys() >= _LAYOUTS:
        yield "packed beside padded", partial(_compare_layouts, found)
    if bench.num_devices > 1:
        yield f"sharded over {bench.num_devices}", partial(_compare_sharded, bench)


def _sum_over_group(bench: Bench) -> Figures:
    """Add up over a group of one: whether NCCL starts at all."""
    stay_alone()
    ones = torch.ones(1024, device=bench.device)
    dist.all_reduce(ones)
    total = float(ones.sum())
    told = {"backend": dist.get_backend_config(), "sum": total}
    return told if total == len(ones) else {**told, "error": f"{len(ones)} ones add up to {total}"}


def _compare(bench: Bench, name: str, case: Case, found: dict[str, Figures]) -> Figures:
    expected, _ = _train_alone(_config(bench, f"{name} float32", case, "float32"), _CPU)
    losses, attention = _train_alone(_config(bench, f"{name} bfloat16", case, "bfloat16"), bench.device)
    found[name] = {**_judge(losses, expected), "attention": attention}
    return found[name]


def _compare_layouts(found: dict[str, Figures]) -> Figures:
    """Compare the loss of all rows before training: of one row each, and of several in one."""
    one, other = (found[name]["losses"][0] for name in _LAYOUTS)
    return _judge([one], [other])


def _compare_sharded(bench: Bench) -> Figures:
    """Compare what several processes make of a global batch with what one does."""
    num = bench.num_devices
    alone = _config(bench, "alone", Case(), "bfloat16", gradient_accumulation_steps=num)
    expected, _ = _train_alone(alone, bench.device)
    together = _config(
        bench, "together", Case(), "bfloat16", gradient_accumulation_steps=1, fsdp="full_shard"
    )
    job = make_job(together, num)
    torch.multiprocessing.spawn(_train_in_group, (num, bench.folder, job, bench.device.type), num)
    return _judge(json.loads((bench.folder / "losses.json").read_text()), expected)


def _train_in_group(rank: int, num_workers: int, folder: Path, job: TrainJob, device_type: str) -> None:
    device = torch.device(device_type, rank) if device_type == "cuda" else _CPU
    losses = _run(set_up_in_group(rank, num_workers, folder, job, device))
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


def _train_alone(config: TrainConfig, device: torch.device) -> tuple[list[float], str]:
    training = set_up_alone(make_job(config), device)
    return _run(training), attention_of(training.model)


def _run(training: Training) -> list[float]:
    """Return the losses of all rows before and after some steps, and of the steps between."""
    assert training.validation is not None
    before = evaluate(training, training.validation)["eval_loss"]
    steps = [take_step(training, step).loss for step in range(1, _STEPS + 1)]
    after = evaluate(training, training.validation)["eval_loss"]
    tear_down(training)
    return [before, *steps, after]


def _judge(losses: list[float], expected: list[float]) -> Figures:
    difference = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, expected, strict=True))
    told = {"difference": difference, "tolerance": TOLERANCE, "losses": losses, "expected": expected}
    is_near = difference <= TOLERANCE  # no number is near to NaN
    return told if is_near else {**told, "error": f"losses differ by {difference:.2%}"}


def _config(bench: Bench, name: str, case: Case, dtype: str, **settings: Any) -> TrainConfig:
    model = bench.folder / f"parity-{case.shape['model_type']}"
    rows = bench.folder / "parity.jsonl"
    if not model.is_dir():
        write_model(case.shape, model, _CPU)
    if not rows.is_file():
        write_rows(rows, mixed_lengths(_TOKENS, _LONGEST), num_words=50)
    common = {
        "validation_dataset": str(rows),
        "dtype": dtype,
        "max_seq_length": _LONGEST,
        "max_steps": _STEPS,
        "lora_dropout": 0.0,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 2,
        "max_eval_samples": 0,
    }
    return make_config(bench.folder / "home", name, model, rows, **{**common, **case.settings, **settings})
