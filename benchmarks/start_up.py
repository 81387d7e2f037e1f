"""Seconds from the command to the first step, with a tiny model, beside an empty TorchTrainer.

The empty one's loop imports transformers and peft, and is done.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turn import FOLDER, answer

from tunesmith.config import TrainConfig
from tunesmith.runs.identity import locate_run
from tunesmith.runs.metrics_log import iterate_metrics

_POLL_S = 0.02
_TIMEOUT_S = 300


def main() -> None:
    model, num_turns = Path(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_model(model, folder / "model")
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps(_row(i)) + "\n" for i in range(64)))
        figures: dict[str, list[float]] = {"tunesmith": [], "empty": []}
        for turn in range(num_turns):
            figures["tunesmith"].append(_time_tunesmith(folder / "model", rows, folder / f"run-{turn}"))
            figures["empty"].append(_time_empty(folder / f"empty-{turn}"))
    answer(figures)


def _time_tunesmith(model: Path, rows: Path, home: Path) -> float:
    settings: dict[str, Any] = {
        "model_path": model,
        "dataset_name": str(rows),
        "input_template": "{question} ",
        "output_template": "{answer}",
        "max_seq_length": 64,
        "max_steps": 1,
        "logging_steps": 1,
        "home": home,
        "run_name": "run",
    }
    metrics = locate_run(TrainConfig(**settings)).metrics_path
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    def has_stepped() -> bool:
        return metrics.exists() and any("loss" in line for line in iterate_metrics(metrics))

    return _time_until(has_stepped, [sys.executable, "-m", "tunesmith", "train", *flags])


def _time_empty(folder: Path) -> float:
    command = [sys.executable, str(FOLDER / "empty_trainer.py"), str(folder)]
    return _time_until((folder / "reached").exists, command)


def _time_until(is_reached: Callable[[], bool], command: list[str]) -> float:
    """Return the seconds from the command's start until `is_reached`; waits for its end.

    Raises:
        SystemExit: it failed, or took longer than 5 minutes.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not is_reached():
        seconds = time.perf_counter() - start
        if process.poll() is not None or seconds > _TIMEOUT_S:
            process.kill()
            raise SystemExit(f"error: no first step in {seconds:.0f} s: {' '.join(command)}")
        time.sleep(_POLL_S)
    seconds = time.perf_counter() - start
    if process.wait(_TIMEOUT_S):
        raise SystemExit(f"error: exit code {process.returncode}: {' '.join(command)}")
    return seconds


def _row(number: int) -> dict[str, str]:
    return {"question": f"What is {number} plus {number}?", "answer": str(2 * number)}


def _write_model(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(source)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
