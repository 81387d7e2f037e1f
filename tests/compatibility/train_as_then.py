"""Trains with the code of commit ab4f82f, whose `src` is on PYTHONPATH: `train_as_then.py '[{settings}, …]'`.

In the working folder, for each set of settings: a run from beginning to end, with its `final/`, called `whole`, or
`whole-full` with `full_ft`; and an unnamed one, killed as soon as its first checkpoint is there. `made_on.json` names
the processor.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processor import processor

from tunesmith.config import TrainConfig
from tunesmith.data.prepare import prepare
from tunesmith.export.final import write_final
from tunesmith.model.load import load_model_config, load_tokenizer
from tunesmith.runs import RunDir  # type: ignore[attr-defined]
from tunesmith.train.loop import train
from tunesmith.train.start import locate_run, record_params
from tunesmith.train.worker import ProcessWorker, TrainJob


class KilledError(Exception):
    """Ends a training as a kill does: without a word."""


class KilledWorker(ProcessWorker):
    def report(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        raise KilledError


def start(settings: dict[str, Any], worker_class: type[ProcessWorker]) -> None:
    config: Any = TrainConfig(**settings)
    run: RunDir = locate_run(config)
    prepared = prepare(config, load_tokenizer(config), run.datasets_path)
    run.path.mkdir(parents=True, exist_ok=True)
    record_params(run, config, load_model_config(config), prepared, 1)
    job = TrainJob(config, run, prepared.folder, num_threads=1)
    with contextlib.suppress(KilledError):
        train(job, worker_class(0, 1, torch.device("cpu"), run))
        write_final(run, config)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for settings in json.loads(sys.argv[1]):
        start({**settings, "run_name": "whole-full" if settings.get("full_ft") else "whole"}, ProcessWorker)
        start(settings, KilledWorker)
    Path("made_on.json").write_text(json.dumps(processor(), indent=1) + "\n")
