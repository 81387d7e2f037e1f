"""Tokens per second and core: tokenizing, labelling and packing beside `datasets.map` over the same rows.

The peer only tokenizes, in batches, with the same fast tokenizer, one process and one thread; its rows are loaded
before the clock starts. Ours reads them, marks what is trained, packs and writes. `prepare` is the whole of it:
reading the source, splitting and publishing too.

The word after the length says of which rows: `templates`, or `messages`, of which the peer applies the chat template.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from turn import answer

from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.data.fit import Limits
from tunesmith.data.mixture import recorded_formats
from tunesmith.data.packing import pack_examples
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.token_files import write_tokens

_TURNS = 3


def main() -> None:
    model, data, max_length, kind = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    speeds: dict[str, list[float]] = {"tokenize and pack": [], "prepare": [], "datasets.map": []}
    for turn in range(_TURNS + 1):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = data if kind == "templates" else _as_messages(data, folder / "messages.jsonl")
            start = time.perf_counter()
            prepared = prepare(_config(model, rows, max_length, kind), tokenizer, folder / "sets")
            tokens = prepared.stats.train.tokens
            measured = [
                tokens / (time.perf_counter() - start),
                tokens / _time_stage(prepared, tokenizer, max_length, folder / "again.arrow"),
                _time_map(rows, tokenizer, folder, kind),
            ]
        if turn:  # the first warms up
            for name, speed in zip(("prepare", "tokenize and pack", "datasets.map"), measured, strict=True):
                speeds[name].append(speed)
    answer({"tokens_per_s": speeds, "full": prepared.stats.train.packing_efficiency, "tokens": tokens})


def _as_messages(data: Path, path: Path) -> Path:
    """Write the rows as conversations of one question and its answer."""
    with data.open() as rows, path.open("w") as file:
        for line in rows:
            row = json.loads(line)
            talk = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
            file.write(json.dumps({"messages": talk}) + "\n")
    return path


def _config(model: Path, data: Path, max_length: int, kind: str) -> TrainConfig:
    templates = {"input_template": "{prompt}", "output_template": "{completion}"}
    return TrainConfig(
        model_path=model,
        dataset_name=str(data),
        **(templates if kind == "templates" else {}),
        train_split_ratio=1.0,
        max_seq_length=max_length,
        num_proc=1,
    )


def _time_stage(prepared: Prepared, tokenizer: PreTrainedTokenizerFast, max_length: int, path: Path) -> float:
    rows = prepared.data_dir / "training.jsonl"
    start = time.perf_counter()
    (row_format,) = recorded_formats(prepared.row_format, [HFDatasetConfig()])
    with_tokenizer = row_format.with_tokenizer(tokenizer, "2026-01-01")
    write_tokens(rows, path, [with_tokenizer], Limits(max_length, ["truncate"]), num_proc=1)
    pack_examples(np.asarray(prepared.train.lengths), max_length, seed=0)
    return time.perf_counter() - start


def _time_map(data: Path, tokenizer: PreTrainedTokenizerFast, folder: Path, kind: str) -> float:
    """Return the tokens per second of the map alone."""
    rows = Dataset.from_json(str(data), cache_dir=str(folder / "cache"))

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [a + b for a, b in zip(batch["prompt"], batch["completion"], strict=True)]
        return {"input_ids": tokenizer(texts)["input_ids"]}

    def apply_template(batch: dict[str, list[list[dict[str, str]]]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer.apply_chat_template(batch["messages"], return_dict=False)}

    start = time.perf_counter()
    way = tokenize if kind == "templates" else apply_template
    mapped = rows.map(way, batched=True, remove_columns=rows.column_names)
    seconds = time.perf_counter() - start
    return sum(len(ids) for ids in mapped["input_ids"]) / seconds


if __name__ == "__main__":
    main()
