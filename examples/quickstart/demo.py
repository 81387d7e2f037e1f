"""Run the quickstart: `tunesmith train examples/quickstart/run.yaml`, or show its result if it is finished."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from tunesmith import TrainConfig
from tunesmith.cli import main
from tunesmith.settings import load_settings
from tunesmith.train.start import is_finished, locate_run
from tunesmith.view.summary import format_summary

RUN_FILE = Path(__file__).parent / "run.yaml"


def run_demo() -> int:
    """Return the exit code; a run that broke off goes on, a finished one is only shown."""
    config = load_settings(TrainConfig, RUN_FILE, {}, os.environ)
    run = locate_run(config)
    if is_finished(run, config) and run.holds_final():
        again = f"remove {os.path.relpath(run.home)} to train again"
        print(f"training: finished already, this is its result; {again}\n")
        Console().print(format_summary(run), soft_wrap=True)
        return 0
    command = ["train", os.path.relpath(RUN_FILE)]
    print(f"training: tunesmith {' '.join(command)}\n", flush=True)
    return main(command)


if __name__ == "__main__":
    sys.exit(run_demo())
