"""The README's commands work, in the order a reader meets them, from a folder of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from tunesmith.config import TrainConfig
from tunesmith.config.layers import load_settings

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has after `make model`, with a tiny model in place of the small one."""
    # Here: the tests of the text alone need no torch.
    from support.scores import minilm_folder
    from support.tiny_models import save_model
    from support.tokenizers import build_tokenizer

    folder = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / "examples", folder / "examples", ignore=shutil.ignore_patterns("build"))
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("tunesmith", "python"):
        program = folder / ".venv/bin" / name
        module = "-m tunesmith " if name == "tunesmith" else ""
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n')
        program.chmod(0o755)
    os.utime(folder / "constraints.txt", (0, 0))
    os.utime(folder / "pyproject.toml", (0, 0))
    (folder / ".venv/.installed").touch()
    (folder / "examples/quickstart/build").mkdir()
    (folder / "examples/quickstart/build/all-MiniLM-L6-v2").symlink_to(minilm_folder())
    model = folder / "examples/quickstart/build/SmolLM2-135M-Instruct"
    save_model(model, build_tokenizer("chatml"))
    return folder


def run(command: str, clone: Path, **environment: str) -> str:
    result = subprocess.run(
        command,
        shell=True,
        cwd=clone,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


def test_the_readme_names_the_commands_that_are_tested() -> None:
    assert COMMANDS == [
        "make demo",
        "make test",
        ".venv/bin/tunesmith inspect examples/quickstart/run.yaml",
        ".venv/bin/tunesmith watch runs/quickstart --once",
        ".venv/bin/tunesmith train examples/quickstart/run.yaml --max_steps 44",
        ".venv/bin/tunesmith evaluate runs/quickstart examples/quickstart/evaluate.yaml",
        ".venv/bin/tunesmith convert runs/quickstart --output_dir runs/my_model",
    ]


@pytest.mark.ray
@pytest.mark.slow
def test_the_commands_run_in_order(clone: Path) -> None:
    fetch = "examples/quickstart/fetch_"
    make_demo = [
        line for line in run("make --no-print-directory -n demo", clone).splitlines() if fetch not in line
    ]
    assert len(make_demo) == 2
    for line in make_demo:
        printed = run(line, clone, TUNESMITH_MAX_STEPS="2", TUNESMITH_EVAL_STEPS="22")
    assert "finished: step 2 of 2" in printed
    assert "adapter" in printed
    assert "BERTScore F1" in printed
    assert list(clone.glob("runs/quickstart/results/*/ray_results/*/evaluation/*/report.html"))
    assert list(clone.glob("runs/quickstart/results/*/hf_format/model.safetensors"))
    assert list(clone.glob("runs/quickstart/results/*/ray_results/*/loss_curve.png"))
    assert "pytest" in run("make -n test", clone)
    marked = run(COMMANDS[2], clone)
    assert "⟦" in marked
    assert "packing" in marked
    assert "finished" in run(COMMANDS[3], clone)
    assert "finished: step 44 of 44" in run(COMMANDS[4], clone, TUNESMITH_EVAL_STEPS="22")
    again = run("make --no-print-directory -n demo", clone).splitlines()[-1]
    assert "finished already" in run(again, clone, TUNESMITH_MAX_STEPS="2", TUNESMITH_EVAL_STEPS="22")
    assert "report.html" in run(COMMANDS[5], clone)
    assert "equal an independent merge" in run(COMMANDS[6], clone)
    assert (clone / "runs/my_model/model.safetensors").exists()


def test_the_example_config_is_valid(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    path = tmp_path / "run.yaml"
    path.write_text(block)
    config = load_settings(TrainConfig, path, {}, {})
    assert config.hf_model_id == "Qwen/Qwen3-8B"
    assert config.learning_rate == 5e-5


@pytest.mark.ray
@pytest.mark.slow
def test_the_library_example_trains(clone: Path, tmp_path: Path) -> None:
    (snippet,) = blocks("python")
    rows = tmp_path / "my_rows.jsonl"
    rows.write_text('{"text": "a line of text to learn from"}\n' * 3 + '{"text": "another line"}\n' * 3)
    model = clone / "examples/quickstart/build/SmolLM2-135M-Instruct"
    snippet = snippet.replace("path/to/model", str(model)).replace("my_rows.jsonl", str(rows))
    snippet = snippet.replace("max_steps=100", "max_steps=2")
    script = tmp_path / "example.py"
    script.write_text(snippet)
    printed = run(f'"{sys.executable}" {script} 2>errors.txt', tmp_path)
    exported = Path(printed.strip())
    assert (tmp_path / exported / "model.safetensors").exists()
