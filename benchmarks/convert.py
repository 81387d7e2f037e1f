"""Time and memory of a conversion beside those of PEFT's merge_and_unload and save_pretrained.

    .venv/bin/python benchmarks/convert.py [--model FOLDER] [--rank 16] [--rounds 3]

Each way runs in a process of its own, in turns. The clock starts behind the imports and ends when the files
are on the disk. The peak of the resident memory is also given above what the process held behind the imports.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tunesmith.atomic_files import sync_files

_MODEL = Path(__file__).parents[1] / "examples/quickstart/build/SmolLM2-135M-Instruct"
_WAYS = {
    "peft": "PEFT",
    "tunesmith": "tunesmith, --no-verify",
    "tunesmith proven": "tunesmith",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=_MODEL, help="model folder")
    parser.add_argument(
        "--rank", type=int, default=16, help="rank of the random adapter on all linear layers"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each way runs")
    parser.add_argument("--way", nargs=2, metavar=("NAME", "ADAPTER"), help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.way:
        print(json.dumps(_measure(words.way[0], words.model, Path(words.way[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        _write_adapter(words.model, adapter, words.rank)
        figures: dict[str, list[dict[str, float]]] = {way: [] for way in _WAYS}
        for _ in range(words.rounds):
            for way, measured in figures.items():
                measured.append(_run_apart(way, words.model, adapter))
    Console().print(_tabulate(figures, words.model))


def _run_apart(way: str, model: Path, adapter: Path) -> dict[str, float]:
    words = [sys.executable, __file__, "--model", str(model), "--way", way, str(adapter)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _measure(way: str, model: Path, adapter: Path) -> dict[str, float]:
    convert = _convert_with_peft if way == "peft" else _convert_with_tunesmith
    with tempfile.TemporaryDirectory(dir=adapter.parent) as folder:
        prepare = _import_peft if way == "peft" else _import_tunesmith
        prepare(model)
        gc.collect()
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        start = time.monotonic()
        convert(model, adapter, Path(folder) / "out", way)
        seconds = time.monotonic() - start
    return {"seconds": seconds, "peak": _memory("VmHWM"), "raised": _memory("VmHWM") - before}


def _import_peft(model: Path) -> None:
    import peft  # noqa: F401
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


def _import_tunesmith(model: Path) -> None:
    import tunesmith.export.convert  # noqa: F401

    _import_peft(model)


def _convert_with_peft(model: Path, adapter: Path, output: Path, way: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    sync_files(output)


def _convert_with_tunesmith(model: Path, adapter: Path, output: Path, way: str) -> None:
    from tunesmith.config import ConvertConfig, TrainConfig
    from tunesmith.export.convert import export
    from tunesmith.runs.tuned import TunedModel

    tuned = TunedModel("adapter", adapter, TrainConfig(model_path=model))
    export(tuned, ConvertConfig(verify=way == "tunesmith proven"), output)


def _write_adapter(model: Path, folder: Path, rank: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    adapted = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(folder)


def _memory(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


def _tabulate(figures: dict[str, list[dict[str, float]]], model: Path) -> Table:
    table = Table(title=f"{model.name}: medians of {len(figures['peft'])} rounds, and shares of PEFT's")
    for name in ("way", "time", "peak memory", "above imports"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    medians = {
        way: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        for way, measured in figures.items()
    }
    for way, ours in medians.items():
        shares = {key: ours[key] / medians["peft"][key] for key in ours}
        sizes = [f"{ours[key] / 2**20:,.0f} MiB ({shares[key]:.2f})" for key in ("peak", "raised")]
        table.add_row(_WAYS[way], f"{ours['seconds']:.2f} s ({shares['seconds']:.2f})", *sizes)
    return table


if __name__ == "__main__":
    main()
