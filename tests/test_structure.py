"""The house: which way imports run, which module alone imports a heavy library, and how docs/architecture.md shows it.

`WRITE_ARCHITECTURE=1 pytest tests/test_structure.py` writes the page's table and its picture anew.
"""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import tunesmith
from support.house import Room, draw, tabulate
from support.paths import REPOSITORY

PACKAGE = Path(tunesmith.__file__).parent

# An import goes from a room to one of a lower floor, or stays in its room.
FLOORS = {
    "__main__": 15,
    "__init__": 15,
    "chart.scripts": 15,  # what the framework scripts call: commands, as __main__ is
    "cli": 14,
    "verbs": 13,
    "api": 12,
    "serving": 12,
    "chart": 11,
    "evaluate": 11,
    "export": 10,
    "cluster": 9,
    "view": 9,
    "train": 8,
    "evaluate.engines": 7,
    "tracking": 7,
    "planning": 7,
    "model": 6,
    "parallel": 5,
    "objectives": 5,
    "data": 4,
    "failures": 4,
    "signals": 4,
    "options": 3,
    "runs": 3,
    "logs": 2,
    "config": 2,
    "remote": 2,
    "paths": 1,
    "locks": 1,
    "atomic_files": 0,
    "compat": 0,
    "machine": 0,
    "errors": 0,
    "terminal": 0,
    "urls": 0,
}

# Who alone imports a room, whatever its floor: everything else runs without Ray.
CALLERS = {"cluster": {"api", "verbs"}}

ONLY_IN = {
    "ray": {"cluster", "compat.py"},
    "peft": {"model/adapters/lora.py", "compat.py"},
    "vllm": {"evaluate/engines/vllm.py"},
    "bert_score": {"evaluate/metrics/bertscore.py"},
    "rouge_score": {"evaluate/metrics/score.py"},
    "sacrebleu": {"evaluate/metrics/score.py"},
    "wandb": {"tracking/wandb.py"},
    "mlflow": {"tracking/mlflow.py"},
    "trackio": {"tracking/trackio.py"},
    "matplotlib": {"view/figures.py"},
    "datasets": {"data/hub.py"},
    "fsspec": {"remote/backend.py"},
}


@cache
def imports_of(path: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def module_name(path: Path) -> str:
    return ".".join(["tunesmith", *path.relative_to(PACKAGE).with_suffix("").parts])


def room_of(name: str) -> str:
    """Return the room of a module: the module itself where it has a floor of its own, else its folder."""
    parts = name.split(".")[1:3]
    if ".".join(parts) in FLOORS:
        return ".".join(parts)
    return parts[0] if parts else "__init__"


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downstairs(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    here = room_of(module_name(path))
    assert here in FLOORS, f"give `{here}` a floor"
    for name in imports_of(path):
        if name.split(".")[0] != "tunesmith":
            continue
        there = room_of(name)
        if there not in FLOORS:  # a name of the package itself, such as __version__
            continue
        assert there == here or FLOORS[there] < FLOORS[here] or there == "__init__", (
            f"{relative} imports {name}"
        )
        assert there == here or here in CALLERS.get(there, {here}), f"{relative} imports {name}"


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Neither at once nor through others, nor inside functions, where an import hides it."""
    names = {module_name(path): path for path in MODULES if path.stem != "__init__"}
    imports = {name: imports_of(path) & names.keys() - {name} for name, path in names.items()}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_heavy_library_is_imported_in_one_place(library: str) -> None:
    importing = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if any(name.split(".")[0] == library for name in imports_of(path))
    }
    allowed = ONLY_IN[library]
    assert importing, f"nothing imports {library}"
    assert all(path in allowed or path.split("/")[0] in allowed for path in importing), importing


def test_the_page_shows_the_house_as_it_is() -> None:
    rooms = [Room(name, floor, _purpose_of(name)) for name, floor in FLOORS.items()]
    imports = {
        (room_of(module_name(path)), there)
        for path in MODULES
        for there in map(room_of, imports_of(path))
        if FLOORS.get(there, 99) < FLOORS[room_of(module_name(path))]
    }
    page, picture = REPOSITORY / "docs/architecture.md", REPOSITORY / "docs/architecture.svg"
    table = f"<!-- rooms -->\n{tabulate(rooms, imports)}\n<!-- end of rooms -->"
    shown = re.sub(
        "<!-- rooms -->.*<!-- end of rooms -->", lambda _: table, page.read_text(), flags=re.DOTALL
    )
    if os.environ.get("WRITE_ARCHITECTURE"):
        page.write_text(shown)
        picture.write_text(draw(rooms, imports))
    assert page.read_text() == shown, "write it anew, as said above"
    assert picture.read_text() == draw(rooms, imports), "write it anew, as said above"


def _purpose_of(room: str) -> str:
    """Return the first line of a room's docstring."""
    path = PACKAGE.joinpath(*room.split("."))
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
