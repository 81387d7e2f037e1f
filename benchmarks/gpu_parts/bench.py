"""What the parts share: the device, models and rows on disk, and a training that is measured step by step."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flops import count_flops, measure_shape
from in_process import lengths_of, make_job, plan, set_up_alone, synchronize
from turn import peak_bytes

from gpu_parts.shapes import SHAPES, write_model, write_rows
from tunesmith.config import TrainConfig
from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.load import attention_of
from tunesmith.planning.devices import peak_flops
from tunesmith.train.set_up import tear_down
from tunesmith.train.state import Training
from tunesmith.train.step import take_step

Figures = dict[str, Any]
# What a part yields: the name of something that it measures, and what measures it.
Work = tuple[str, Callable[[], Figures]]


@dataclass(frozen=True)
class Scale:
    """What is measured, and how large it is.

    Attributes:
        lever_blocks: of the model that the levers are tried with: the shape's, of so many blocks.
        full: the shapes that are fine-tuned in full.
        lengths: those of the rows whose memory is measured.
        matrix_size, copied_bytes: what products and copies are timed with.
    """

    shape: str = "llama-3.1-8b"
    lever_blocks: int = 8
    full: tuple[str, ...] = ("llama-3.2-1b", "llama-3.2-3b")
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    matrix_size: int = 8192
    copied_bytes: int = 2 << 30


TINY = Scale("tiny", 1, ("tiny",), (32, 64), 256, 1 << 20)


@dataclass(frozen=True)
class Bench:
    """Where and with what it is measured.

    Attributes:
        folder: holds models, rows and runs.
        rows, max_length, accumulation: of the training that is measured.
        num_steps: those that are timed, after a first one.
        num_devices: those over which weights are sharded where that is tried.
        settings: more of `tunesmith train`.
    """

    device: torch.device
    folder: Path
    scale: Scale
    rows: int
    max_length: int
    accumulation: int
    num_steps: int
    num_devices: int
    settings: dict[str, Any]

    def model(self, shape: str, num_blocks: int | None = None) -> Path:
        """Return the folder of a model of this shape, or of its first blocks, which is written once."""
        blocks = num_blocks or SHAPES[shape]["num_hidden_layers"]
        folder = self.folder / f"{shape}-{blocks}"
        if not (folder / "config.json").is_file():
            write_model({**SHAPES[shape], "num_hidden_layers": blocks}, folder, self.device)
        return folder

    def full_rows(self, shape: str, length: int, num_rows: int) -> Path:
        """Return a file of rows of one example each, which fills them."""
        path = self.folder / f"rows-{length}-{num_rows}.jsonl"
        return write_rows(path, [length] * num_rows, SHAPES[shape]["vocab_size"] - 1)

    def lora(self, name: str, model: Path, rows: Path, **settings: Any) -> TrainConfig:
        """Return the settings of LoRA training, called `name`."""
        common: dict[str, Any] = {
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "max_seq_length": self.max_length,
            "per_device_train_batch_size": self.rows,
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": self.num_steps + 1,
        }
        return make_config(self.folder / "home", name, model, rows, **{**common, **settings, **self.settings})

    @contextmanager
    def training(self, config: TrainConfig) -> Iterator[Training]:
        """Yield the training, set up; what lived at most is counted from here on."""
        self.free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        training = set_up_alone(make_job(config), self.device)
        try:
            yield training
        finally:
            tear_down(training)
            if config.torch_compile:
                torch.compiler.reset()

    def free(self) -> None:
        """Give back what nothing holds any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, config: TrainConfig) -> Figures:
        """Return what some steps took beside what was planned, or only that, where the plan says that they don't fit."""
        planned = self.plan(config)
        if not planned["fits"]:
            return planned
        with self.training(config) as training:
            return {**self.measure_steps(training), **planned}

    def plan(self, config: TrainConfig) -> Figures:
        planned = plan(config, self.device)
        memory = planned.memory
        return {"fits": planned.fits, "planned_bytes": memory.total, "planned": asdict(memory)}

    def measure_steps(self, training: Training) -> Figures:
        """Return what the steps of a training took; the first isn't counted."""
        shape = measure_shape(training.model)
        seconds, losses, tokens_per_s, flops_per_s = [], [], [], []
        for step in range(1, self.num_steps + 2):
            start = time.perf_counter()
            result = take_step(training, step)
            synchronize(self.device)
            seconds.append(time.perf_counter() - start)
            losses.append(result.loss)
            tokens_per_s.append(result.counts.tokens / seconds[-1])
            work = count_flops(shape, lengths_of(training, step), result.counts.trained_tokens)
            flops_per_s.append(work / seconds[-1])
            print(f"  step {step}: {tokens_per_s[-1]:,.0f} tokens/s, loss {losses[-1]:.4f}", file=sys.stderr)
        mean = sum(flops_per_s[1:]) / len(flops_per_s[1:])
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        attention = attention_of(training.model)
        problems = [
            *(
                []
                if attention == VARLEN or attention.startswith("flash")
                else [f"attention is `{attention}`"]
            ),
            *([] if all(map(math.isfinite, losses)) else ["a loss isn't finite"]),
        ]
        return {
            "chosen": training.describe(),
            "first_step_s": seconds[0],
            "step_s": seconds[1:],
            "tokens_per_s": tokens_per_s[1:],
            "flops_per_s": mean,
            "mfu": mean / peak if peak else None,
            "losses": losses,
            **self.peaks(),
            **({"error": ", ".join(problems)} if problems else {}),
        }

    def peaks(self) -> Figures:
        """Return the most that lived at once, and that was reserved, with what CUDA and its libraries hold.

        Nothing else may run on the GPU.
        """
        if self.device.type != "cuda":
            return {"peak_bytes": peak_bytes(), "reserved_bytes": None}
        free, total = torch.cuda.mem_get_info(self.device)
        outside = total - free - torch.cuda.memory_reserved(self.device)
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) + outside,
            "reserved_bytes": torch.cuda.max_memory_reserved(self.device) + outside,
        }


def make_config(home: Path, run_name: str, model: Path, rows: Path, **settings: Any) -> TrainConfig:
    """Return settings that train on rows as `write_rows` writes them."""
    common: dict[str, Any] = {
        "model_path": model,
        "dataset_name": str(rows),
        "input_template": "{prompt}",
        "output_template": "{completion}",
        "train_split_ratio": 1.0,
        "home": home,
        "run_name": run_name,
    }
    return TrainConfig(**{**common, **settings})


def scale_of(shape: str) -> Scale:
    return TINY if shape == "tiny" else replace(Scale(), shape=shape)
