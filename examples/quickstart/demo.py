"""Run the quickstart from end to end: train, evaluate base beside tuned, export. What is done already is kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from tunesmith import TrainConfig
from tunesmith.cli import main
from tunesmith.config.layers import load_settings
from tunesmith.runs.folder import ORIGIN_FILE, RunDir, read_versioned_json
from tunesmith.runs.identity import is_finished, locate_run
from tunesmith.view.summary import format_summary

RUN_FILE = Path(__file__).parent / "run.yaml"
EVALUATE_FILE = Path(__file__).parent / "evaluate.yaml"


def run_demo() -> int:
    """Return the exit code of the first command that fails; a demo that broke off goes on where it was."""
    config = load_settings(TrainConfig, RUN_FILE, {}, os.environ)
    run = locate_run(config)
    if is_finished(run, config) and run.holds_final():
        again = f"remove {os.path.relpath(run.home)} to train again"
        print(f"training: finished already, this is its result; {again}\n")
        Console().print(format_summary(run), soft_wrap=True)
    elif exit_code := tunesmith("training", "train", os.path.relpath(RUN_FILE)):
        return exit_code
    home = os.path.relpath(run.home)
    if exit_code := tunesmith("evaluating", "evaluate", home, os.path.relpath(EVALUATE_FILE)):
        return exit_code
    if is_exported(run):
        print(f"\nexporting: done already, `{os.path.relpath(run.export_path)}` holds the best checkpoint")
        return 0
    return tunesmith("exporting", "convert", home, "--overwrite")


def tunesmith(doing: str, *words: str) -> int:
    """Run the command, as a person would, and return its exit code."""
    print(f"\n{doing}: tunesmith {' '.join(words)}\n", flush=True)
    return main(words)


def is_exported(run: RunDir) -> bool:
    """Return whether the export comes from the run's best checkpoint."""
    origin, best = run.export_path / ORIGIN_FILE, run.best_checkpoint()
    if best is None or not origin.is_file():
        return False
    content = read_versioned_json(origin)
    return (content["run"], content["checkpoint"]) == (run.path.name, best.path.name)


if __name__ == "__main__":
    sys.exit(run_demo())
