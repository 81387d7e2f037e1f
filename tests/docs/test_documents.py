"""What the pages for those who carry on name is there: files, headings, commands, messages."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

import tunesmith
from support.paths import REPOSITORY
from tunesmith.cli import main

PAGES = sorted(
    path.relative_to(REPOSITORY)
    for pattern in ("*.md", "docs/*.md", ".github/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
FOLDERS = "|".join(["src", "tests", "docs", "charts", "examples", "benchmarks", r"\.github", r"\.ci"])

MADE = {"charts/raytrain/files/tunesmith.zip"}


def read(page: Path) -> str:
    return (REPOSITORY / page).read_text()


def headings_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]*)\)", read(page)):
        path, _, heading = link.partition("#")
        target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert target.exists(), link
        assert not heading or heading in headings_of(target), link


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_paths_of_the_repository_exist(page: Path) -> None:
    for path in re.findall(rf"[`\s]((?:{FOLDERS})/[\w./*-]+)", read(page)):
        assert path in MADE or list(REPOSITORY.glob(path.rstrip("./"))), path


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_names_in_a_file_are_in_it(page: Path) -> None:
    """`path.py`: `name` and `path.py::name` both mean something that the file defines."""
    for path, name in re.findall(r"`((?:src|tests)/[\w./]+\.py)(?:::|`: `)(\w+)", read(page)):
        assert re.search(rf"\b{name}\b", (REPOSITORY / path).read_text()), f"{path}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_are_targets_and_verbs(page: Path) -> None:
    text = read(page)
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)) <= targets
    for verb in set(re.findall(r"(?:`|^ +|bin/)tunesmith ([a-z]+)\b(?!-)", text, re.MULTILINE)):
        assert main([verb, "--help"]) == 0
    for path, words in re.findall(r"pytest (\S+\.py)(?: -k (\w+))?", text):
        assert words in (REPOSITORY / path).read_text(), f"{path} -k {words}"


def test_every_target_is_explained_by_make_help() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    explained = set(re.findall(r'@echo "make ([\w-]+)', makefile))
    assert set(phony.split()) - explained == {"help", "model", "questions"}


@cache
def messages() -> list[re.Pattern[str]]:
    """Return what the program can say: its longer texts, with anything in place of the values."""
    found = []
    for path in Path(tunesmith.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Constant | ast.JoinedStr):
                continue
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if sum(len(text) for text in texts if isinstance(text, str)) >= 14:
                found.append(re.compile(".+".join(re.escape(str(text)) if text else "" for text in texts)))
    return found


def test_messages_shown_are_those_of_the_program() -> None:
    shown = re.findall(r"^```console\n(.*?)^```", read(Path("docs/debugging.md")), re.MULTILINE | re.DOTALL)
    lines = [line.partition(": ")[2] for block in shown for line in block.splitlines() if line]
    assert len(lines) >= 4
    for line in lines:
        assert any(message.search(line) for message in messages()), line


def test_hooks_and_workflow_call_what_is_here() -> None:
    hooks = yaml.safe_load(read(Path(".pre-commit-config.yaml")))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "nothing is downloaded"
    assert {hook["entry"].split()[0] for hook in hooks[0]["hooks"]} == {".venv/bin/ruff"}
    workflow = yaml.safe_load(read(Path(".github/workflows/ci.yml")))
    commands = [step["run"] for step in workflow["jobs"]["run"]["steps"] if "run" in step]
    assert commands == [".ci/run"]
    called = re.findall(r"^make ([\w-]+)$", read(Path(".ci/run")), re.MULTILINE)
    assert called[:3] == ["lint", "types", "test"], (
        "`make check` would run the tests of `make test` once more"
    )
