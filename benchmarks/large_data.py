"""Seconds and memory of preparing a data set that grows: an eighth, a quarter, a half, the whole of its rows.

    .venv/bin/python benchmarks/large_data.py MODEL 5000000

Each size runs in a process of its own. Its memory is that of the process that prepares, and of the largest of those
that tokenize for it.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from turn import answer, peak_bytes, run_process

_SHARES = (8, 4, 2, 1)


def main() -> None:
    model, num_rows = sys.argv[1], int(sys.argv[2])
    if len(sys.argv) == 4:
        answer(_prepare(Path(model), Path(sys.argv[3])))
        return
    measured = []
    for share in _SHARES:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            _write_rows(rows, num_rows // share)
            figures = run_process(Path(sys.executable), "large_data.py", model, "0", str(rows))
            measured.append({"rows": num_rows // share, "file_bytes": rows.stat().st_size, **figures})
    answer(measured)


def _write_rows(path: Path, num_rows: int) -> None:
    with path.open("w") as file:
        for i in range(num_rows):
            row = {"question": f"What is {i} plus {i % 97}?", "answer": f"{i} plus {i % 97} is {i + i % 97}."}
            file.write(json.dumps(row) + "\n")


def _prepare(model: Path, rows: Path) -> dict[str, float]:
    from transformers import AutoTokenizer

    from tunesmith.config import TrainConfig
    from tunesmith.data.prepare import prepare

    config = TrainConfig(
        model_path=model,
        dataset_name=str(rows),
        input_template="{question}\n",
        output_template="{answer}",
        max_seq_length=512,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = peak_bytes()
    start = time.perf_counter()
    prepared = prepare(config, tokenizer, rows.parent / "datasets")
    return {
        "seconds": time.perf_counter() - start,
        "imports_bytes": before,
        "peak_bytes": peak_bytes(),
        "child_peak_bytes": peak_bytes(resource.RUSAGE_CHILDREN),
        "packing_efficiency": prepared.stats.train.packing_efficiency,
    }


if __name__ == "__main__":
    main()
