"""`make bench-gpu`: LoRA training of a real shape with random weights, on one GPU. No network, no Ray.

    PYTHONPATH=src python benchmarks/gpu.py [--shape llama-3.1-8b] [--steps 4] [--results FILE] [--set NAME=VALUE …]

Beside torch, transformers and peft it needs what the core of tunesmith imports: pydantic, pyarrow, PyYAML, psutil.
The random weights are written to a folder once (16 GB for 8B) and loaded from it as any model's are.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from flops import count_flops, measure_shape
from in_process import lengths_of, make_job, plan_bytes, set_up_alone
from turn import peak_bytes

from tunesmith.atomic_files import write_json
from tunesmith.config import TrainConfig
from tunesmith.planning.devices import peak_flops
from tunesmith.train.set_up import tear_down
from tunesmith.train.state import Training
from tunesmith.train.step import take_step

_FOLDER = Path(__file__).parent
_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,  # at the usual 0.02 every loss is that of guessing
    },
}
PARITY_TOLERANCE = 0.02
_PARITY_STEPS = 3
_LIBRARIES = ("torch", "transformers", "peft", "flash-attn")


def main() -> None:
    words = _parse()
    device = torch.device(words.device)
    with tempfile.TemporaryDirectory(dir=words.folder) as name:
        difference = check_parity(Path(name) / "parity", device)
        print(f"losses beside the CPU's: within {difference:.2%}", file=sys.stderr)
        run = measure(words, Path(name) / "run", device)
    record(words.results, device, {**run, "loss_difference": difference})
    print(json.dumps({key: value for key, value in run.items() if key != "losses"}, indent=1))


def check_parity(folder: Path, device: torch.device) -> float:
    """Return how far the losses of a tiny model in bfloat16 on `device` are from the CPU's in float32.

    Raises:
        SystemExit: it is more than 2 %.
    """
    write_model("tiny", folder / "model", torch.device("cpu"))
    write_rows(folder / "rows.jsonl", num_rows=64, num_tokens=48, num_words=50)
    losses = []
    for where, dtype in ((torch.device("cpu"), "float32"), (device, "bfloat16")):
        config = _make_config(
            folder,
            f"{where.type}-{dtype}",
            dtype=dtype,
            max_seq_length=96,
            max_steps=_PARITY_STEPS,
            lora_dropout=0.0,
            learning_rate=1e-2,
            warmup_ratio=0.0,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        training = set_up_alone(make_job(config), where)
        losses.append([take_step(training, step).loss for step in range(1, _PARITY_STEPS + 1)])
        tear_down(training)
    difference = max(abs(theirs / ours - 1) for theirs, ours in zip(*reversed(losses), strict=True))
    if difference > PARITY_TOLERANCE:
        raise SystemExit(f"error: losses in bfloat16 on {device} and in float32 on the CPU differ: {losses}")
    return difference


def measure(words: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    """Return what some steps of the shape took; the first isn't counted."""
    model = words.model or folder / "model"
    if not (model / "config.json").is_file():
        write_model(words.shape, model, device)
    num_rows = words.rows * words.accumulation * (words.steps + 1)
    num_words = SHAPES[words.shape]["vocab_size"] - 1
    write_rows(folder / "rows.jsonl", num_rows, words.max_length, num_words)
    settings: dict[str, Any] = {
        "model_path": model,
        "max_seq_length": words.max_length,
        "max_steps": words.steps + 1,
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "per_device_train_batch_size": words.rows,
        "gradient_accumulation_steps": words.accumulation,
    }
    config = _make_config(folder, "run", **{**settings, **dict(words.set)})
    job = make_job(config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training = set_up_alone(job, device)
    figures = {
        "shape": words.shape,
        "rows": words.rows,
        "max_length": words.max_length,
        "accumulation": words.accumulation,
        "chosen": training.describe(),
        **_time_steps(training, words.steps + 1, device),
        "peak_bytes": _peak_bytes(device),
        "planned_bytes": plan_bytes(config, device),
    }
    tear_down(training)
    return figures


def _time_steps(training: Training, num_steps: int, device: torch.device) -> dict[str, Any]:
    shape = measure_shape(training.model)
    seconds, losses, tokens_per_s, flops_per_s = [], [], [], []
    for step in range(1, num_steps + 1):
        start = time.perf_counter()
        result = take_step(training, step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(result.loss)
        tokens_per_s.append(result.counts.tokens / seconds[-1])
        work = count_flops(shape, lengths_of(training, step), result.counts.trained_tokens)
        flops_per_s.append(work / seconds[-1])
        print(f"step {step}: {tokens_per_s[-1]:,.0f} tokens/s, loss {result.loss:.4f}", file=sys.stderr)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    mean = sum(flops_per_s[1:]) / len(flops_per_s[1:])
    return {
        "step_s": seconds[1:],
        "first_step_s": seconds[0],
        "tokens_per_s": tokens_per_s[1:],
        "flops_per_s": mean,
        "mfu": mean / peak if peak else None,
        "losses": losses,
    }


def _peak_bytes(device: torch.device) -> int:
    """Return what lived at once at most, with what CUDA and its libraries hold. Nothing else may run on the GPU."""
    if device.type != "cuda":
        return peak_bytes()
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_allocated(device) + outside


def write_model(shape: str, folder: Path, device: torch.device) -> None:
    """Write a model with random weights and a tokenizer of one token a word, made on `device`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    num_words = SHAPES[shape]["vocab_size"] - 1
    vocabulary = {"<end>": num_words, **{f"t{i}": i for i in range(num_words)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=num_words)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def write_rows(path: Path, num_rows: int, num_tokens: int, num_words: int) -> None:
    """Write rows of `num_tokens` random tokens, the end token included; all but the first are trained."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(0)
    with path.open("w") as file:
        for _ in range(num_rows):
            first, *others = (f"t{numbers.randrange(num_words)}" for _ in range(num_tokens - 1))
            file.write(json.dumps({"prompt": first, "completion": " " + " ".join(others)}) + "\n")


def _make_config(folder: Path, run_name: str, **settings: Any) -> TrainConfig:
    common: dict[str, Any] = {
        "model_path": folder / "model",
        "dataset_name": str(folder / "rows.jsonl"),
        "input_template": "{prompt}",
        "output_template": "{completion}",
        "train_split_ratio": 1.0,
        "home": folder / "home",
        "run_name": run_name,
    }
    return TrainConfig(**{**common, **settings})


def record(path: Path, device: torch.device, run: dict[str, Any]) -> None:
    """Put this run into the file of results, in place of an earlier one of the same shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.is_file() else {"runs": []}
    others = [one for one in results["runs"] if one["shape"] != run["shape"]]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    write_json(path, {"device": name, "versions": _versions(), "runs": [*others, run]})


def _versions() -> dict[str, str]:
    installed = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    return {name: installed[name] for name in _LIBRARIES if name in installed}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--model", type=Path, help="folder that holds, or is to keep, the random weights")
    parser.add_argument("--max_length", type=int, default=4096, help="tokens of each row")
    parser.add_argument("--rows", type=int, default=2, help="rows of a microbatch")
    parser.add_argument("--accumulation", type=int, default=16, help="microbatches of a step")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed, after the first")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--set", type=lambda text: tuple(text.split("=", 1)), action="append", default=[], metavar="NAME=VALUE",
        help="another setting of `tunesmith train`",
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    parser.add_argument("--results", type=Path, default=_FOLDER / "results" / "gpu.json")
    words = parser.parse_args()
    if words.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is at hand; --device cpu --shape tiny shows that the program runs")
    return words


if __name__ == "__main__":
    main()
