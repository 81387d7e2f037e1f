"""This version beside an older one, in turn: did a change cost speed or memory, and are the losses the same?

    .venv/bin/python benchmarks/versions.py --commit ab4f82f [--turns 3] [--steps 6] [--data FILE]

Each version runs its own `ours.py` with its own source, in a process of its own. The first step of a turn isn't
counted. Nothing else should compute meanwhile.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from statistics import median

from training import MODEL, QUESTIONS, REPOSITORY, make_task
from turn import Figures, run_turn

_NOW = "this version"


def main() -> None:
    words = _parse()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        task = make_task(words.model, words.data, folder, words.steps)
        sources = {words.commit: _extract(words.commit, folder / "older"), _NOW: REPOSITORY}
        turns: dict[str, list[Figures]] = {name: [] for name in sources}
        for number in range(words.turns):
            for name, source in sources.items():
                print(f"turn {number + 1} of {words.turns}: {name}", file=sys.stderr, flush=True)
                benchmarks = source / "benchmarks"
                turns[name].append(run_turn(Path(sys.executable), "ours.py", "default", task, benchmarks))
    for name, figures in turns.items():
        print(f"{name}: {', '.join(f'{_tokens_per_second(one):.0f}' for one in figures)} tokens/s")
    older, now = turns[words.commit], turns[_NOW]
    speed = median(map(_tokens_per_second, now)) / median(map(_tokens_per_second, older))
    memory = median(one.peak_bytes for one in now) / median(one.peak_bytes for one in older)
    print(f"tokens/s: {speed:.3f} × those of {words.commit}; peak memory: {memory:.3f} ×")
    fastest = min(map(_fastest_step, now)) / min(map(_fastest_step, older))
    print(f"fastest step: {fastest:.3f} × as long, which a busy machine changes least")
    same = all(one.losses == older[0].losses for one in [*older, *now])
    print(f"losses of {words.steps} steps: {'equal to the last digit' if same else 'they differ'}")


def _extract(commit: str, folder: Path) -> Path:
    """Write the commit's files to `folder`, and return it."""
    packed = subprocess.run(["git", "archive", commit], cwd=REPOSITORY, stdout=subprocess.PIPE, check=True)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


def _tokens_per_second(figures: Figures) -> float:
    return sum(figures.tokens[1:]) / sum(figures.step_s[1:])


def _fastest_step(figures: Figures) -> float:
    """Return the seconds per token of the turn's fastest step."""
    return min(s / tokens for s, tokens in zip(figures.step_s[1:], figures.tokens[1:], strict=True))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", required=True, help="the older version")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, default=QUESTIONS, help="JSON lines of `question` and `answer`")
    parser.add_argument("--turns", type=int, default=3, help="how often each version runs")
    parser.add_argument("--steps", type=int, default=6, help="steps a turn; the first isn't counted")
    return parser.parse_args()


if __name__ == "__main__":
    main()
