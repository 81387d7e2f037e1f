"""`make bench`: tunesmith beside its peers on this machine's CPU; the results go to docs/performance.md.

    .venv/bin/python benchmarks/training.py [--data FILE] [--turns 3] [--steps 4] [--only training start-up]

Every way runs in a process of its own, all of them in turn, several times. Nothing else should compute
meanwhile. What was measured is written as soon as a part is done; parts that didn't run keep what they had.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import page
import torch
from ours import LEVERS
from turn import FOLDER, Figures, Task, run_process, run_turn

from tunesmith.atomic_files import write_json
from tunesmith.errors import ResourceError
from tunesmith.machine import usable_cpus
from tunesmith.model.compilation import check_compiler

REPOSITORY = FOLDER.parent
_QUICKSTART = REPOSITORY / "examples" / "quickstart" / "build"
MODEL = _QUICKSTART / "SmolLM2-135M-Instruct"
QUESTIONS = _QUICKSTART / "python_questions.jsonl"
_OURS = Path(sys.executable)
_LIBRARIES = ("torch", "transformers", "peft", "ray", "datasets")

NUM_HELD_OUT = 16
# The same loss of the same rows by different kernels in bfloat16.
LOSS_TOLERANCE = 0.01
# After as many examples: packed ways have taken fewer, larger steps.
TRAINED_LOSS_TOLERANCE = 0.08


@dataclass(frozen=True)
class Way:
    """One way to train. `num_steps` steps, if that's fewer than the others take."""

    script: str
    variant: str
    num_steps: int | None = None

    @property
    def is_ours(self) -> bool:
        return self.script == "ours.py"


WAYS = {
    "tunesmith": Way("ours.py", "default"),
    "TRL": Way("peers/trl_sft.py", "default"),
    "TRL, no checkpointing": Way("peers/trl_sft.py", "no-checkpointing"),
    # A step of it takes half a minute on two cores.
    "TRL, packed": Way("peers/trl_sft.py", "packed", num_steps=2),
    "Trainer": Way("peers/plain_trainer.py", "default"),
}


@dataclass(frozen=True)
class Setting:
    """What the parts of the benchmark are told."""

    task: Task
    data: Path
    peers: Path
    num_turns: int
    num_rows: int


def main() -> None:
    words = _parse()
    with tempfile.TemporaryDirectory() as folder:
        setting = _prepare(words, Path(folder))
        for name in words.only:
            print(f"{name} …", file=sys.stderr, flush=True)
            record(words.results, {"machine": describe_machine(), name: PARTS[name](setting)})
    page.write(words.results.parent, words.page)
    print(f"written: {words.results}, {words.page}")


def run_training(setting: Setting) -> dict[str, Any]:
    """Train every way in turn; return each one's figures by turn."""
    turns: dict[str, list[Figures]] = {name: [] for name in WAYS}
    for number in range(setting.num_turns):
        for name, way in WAYS.items():
            print(f"  turn {number + 1} of {setting.num_turns}: {name}", file=sys.stderr, flush=True)
            task = replace(setting.task, num_steps=way.num_steps or setting.task.num_steps)
            python = _OURS if way.is_ours else setting.peers
            turns[name].append(run_turn(python, way.script, way.variant, task))
        check_losses({name: figures[-1] for name, figures in turns.items()})
    # The folders are this machine's own.
    names = {key: Path(getattr(setting.task, key)).name for key in ("model", "train", "held_out")}
    return {"task": {**asdict(setting.task), **names}, "turns": _plain(turns)}


def run_levers(setting: Setting) -> dict[str, Any]:
    """Train as by default, and with each lever left out, in turn; return each one's figures by turn."""
    turns: dict[str, list[Figures]] = {}
    for number in range(setting.num_turns):
        for lever in ("default", *_levers_at_hand()):
            print(f"  turn {number + 1} of {setting.num_turns}: without {lever}", file=sys.stderr, flush=True)
            turns.setdefault(lever, []).append(run_turn(_OURS, "ours.py", lever, setting.task))
    return {"turns": _plain(turns)}


def _levers_at_hand() -> list[str]:
    """Return the levers that can be left out here: blocks are compiled where there is a compiler."""
    try:
        check_compiler(torch.device("cpu"))
    except ResourceError as error:
        print(f"  {error.message}", file=sys.stderr)
        return [lever for lever, (settings, _) in LEVERS.items() if "torch_compile" not in settings]
    return [*LEVERS]


def check_losses(figures: Mapping[str, Figures]) -> None:
    """Refuse figures of ways that don't train the same thing.

    Raises:
        SystemExit: it names the two ways that differ, and by how much.
    """
    ours = figures["tunesmith"]
    for name, theirs in figures.items():
        if theirs.held_out_trained_tokens != ours.held_out_trained_tokens:
            raise _disagree(
                name, "trained tokens", theirs.held_out_trained_tokens, ours.held_out_trained_tokens
            )
        if abs(theirs.loss_before / ours.loss_before - 1) > LOSS_TOLERANCE:
            raise _disagree(name, "loss before training", theirs.loss_before, ours.loss_before)
        if theirs.loss_after is None or ours.loss_after is None:
            raise SystemExit("error: too few steps to train as many examples\n\nhint: raise --steps")
        if abs(theirs.loss_after / ours.loss_after - 1) > TRAINED_LOSS_TOLERANCE:
            raise _disagree(name, "loss after training", theirs.loss_after, ours.loss_after)
        if theirs.loss_after >= theirs.loss_before:
            raise SystemExit(
                f"error: {name} learns nothing: {theirs.loss_before:.4f} → {theirs.loss_after:.4f}"
            )


def _disagree(name: str, what: str, theirs: float, ours: float) -> SystemExit:
    return SystemExit(
        f"error: {name} and tunesmith disagree in the {what} of the held-out rows: {theirs:.5g}, {ours:.5g}"
    )


def _plain(turns: Mapping[str, list[Figures]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(one) for one in figures] for name, figures in turns.items()}


def _run_ours(script: str, *arguments: str, num_threads: int | None = None) -> Any:
    return run_process(_OURS, script, *arguments, num_threads=num_threads)


def _prepare_rows(setting: Setting, kind: str) -> Any:
    return _run_ours("tokens.py", setting.task.model, setting.task.train, str(setting.task.max_length), kind)


PARTS: dict[str, Callable[[Setting], Any]] = {
    "training": run_training,
    "levers": run_levers,
    "start-up": lambda it: _run_ours("start_up.py", it.task.model, str(it.num_turns)),
    "checkpoints": lambda it: _run_ours(
        "checkpoints.py", "default", json.dumps(asdict(it.task)), num_threads=it.task.num_threads
    ),
    "tokens": lambda it: _prepare_rows(it, "templates"),
    "conversations": lambda it: _prepare_rows(it, "messages"),
    "workers": lambda it: _run_ours(
        "two_workers.py", "default", json.dumps(asdict(replace(it.task, num_threads=1))), num_threads=1
    ),
    "large-data": lambda it: _run_ours("large_data.py", it.task.model, str(it.num_rows)),
}


def record(path: Path, parts: Mapping[str, Any]) -> None:
    """Put these parts into the file of results, in place of what it had of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, {**results, **parts})


def describe_machine() -> dict[str, Any]:
    """Return the processor, the CPUs that may be used, and the versions of what computes."""
    return {
        "processor": _processor(),
        "cpus": usable_cpus(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_task_rows(data: Path, folder: Path) -> tuple[Path, Path]:
    """Write the rows of `question` and `answer` as prompts and completions: those to train, those held out.

    Raises:
        SystemExit: there are no such rows.
    """
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    if len(rows) <= NUM_HELD_OUT or not {"question", "answer"} <= set(rows[0]):
        raise SystemExit(f"error: `{data}` doesn't hold over {NUM_HELD_OUT} rows of `question` and `answer`")
    texts = [
        {"prompt": f"### Question:\n{row['question']}\n### Answer:\n", "completion": row["answer"]}
        for row in rows
    ]
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, part in ((held_out, texts[:NUM_HELD_OUT]), (train, texts[NUM_HELD_OUT:])):
        path.write_text("".join(json.dumps(text) + "\n" for text in part), encoding="utf-8")
    return train, held_out


def make_task(model: Path, data: Path, folder: Path, num_steps: int) -> Task:
    """Return what every way trains, with its rows written to `folder`."""
    train, held_out = write_task_rows(data, folder)
    return Task(
        model=str(model.absolute()),
        train=str(train),
        held_out=str(held_out),
        batch_size=4,
        max_length=512,
        lora_rank=16,
        lora_alpha=32,
        learning_rate=1e-3,
        num_steps=num_steps,
        num_examples=NUM_HELD_OUT,
        num_threads=usable_cpus(),
    )


def _prepare(words: argparse.Namespace, folder: Path) -> Setting:
    task = make_task(words.model, words.data, folder, words.steps)
    return Setting(task, words.data, words.peers, words.turns, words.rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument(
        "--data",
        type=Path,
        default=QUESTIONS,
        help="JSON lines of `question` and `answer`",
    )
    parser.add_argument(
        "--peers",
        type=Path,
        default=REPOSITORY / ".venv-peers" / "bin" / "python",
        help="Python of the peers' environment",
    )
    parser.add_argument("--turns", type=int, default=3, help="how often each way runs")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn; the first isn't counted")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the large data set")
    parser.add_argument("--results", type=Path, default=FOLDER / "results" / "cpu.json")
    parser.add_argument("--page", type=Path, default=page.PAGE, help="the page to fill")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
