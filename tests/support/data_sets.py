"""Data sets of a few rows, and what was prepared from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.tokenizers import build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.data.prepare import Prepared, prepare

CHAT = [{"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello"}]} for i in range(40)]  # fmt: skip
SUMS = [{"q": f"{i} + 1? ", "a": f"{i + 1}"} for i in range(60)]
SUM_TEMPLATES = {"input_template": "{q}", "output_template": "{a}"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare_both(folder: Path, **changes: Any) -> tuple[TrainConfig, Prepared]:
    sums, chat = write_rows(folder / "sums.jsonl", SUMS), write_rows(folder / "chat.jsonl", CHAT)
    config = TrainConfig(
        datasets=[{"dataset_name": sums, "train_split_ratio": 0.8, **SUM_TEMPLATES}, {"dataset_name": chat}],
        **{"max_seq_length": 64, "num_proc": 1, **changes},
    )
    return config, prepare(config, build_tokenizer("chatml"), folder / "datasets")


def read_set(prepared: Prepared, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prepared.data_dir / f"{name}.jsonl").read_text().splitlines()]
