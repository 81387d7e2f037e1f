"""What the tests share: an offline hub, tiny models, and worker processes that are started once."""

from __future__ import annotations

import ast
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from support.workers import WorkerGroup


class _RayTogether(LoadFileScheduling):
    """Gives the tests of a file to one process, and all tests that start a Ray, of whatever file, to the same one.

    Not `xdist_group`: xdist 3.8 appends the group to an attribute that pytest 9.2 no longer reads, so that its
    `loadgroup` shares out single tests, silently.
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, name = nodeid.partition("::")
        return "ray" if name.partition("[")[0] in _tests_with_ray(self.config.rootpath / file) else file


@cache
def _tests_with_ray(file: Path) -> set[str]:
    """Return the tests of a file that are marked `ray`, one by one or all by its `pytestmark`."""
    tree = ast.parse(file.read_text())
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    marks = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)
    ]
    if any("pytest.mark.ray" in ast.unparse(mark) for mark in marks):
        return {test.name for test in tests}
    return {test.name for test in tests if "pytest.mark.ray" in map(ast.unparse, test.decorator_list)}


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _RayTogether:
    """Choose how `pytest -n` shares out the tests: in the order that they are collected in."""
    config.option.loadscopereorder = False
    return _RayTogether(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that start a Ray: they take longest, and one process runs them all."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.fixture(scope="session")
def two_workers() -> Iterator[WorkerGroup]:
    """Two gloo processes of one thread each."""
    group = WorkerGroup(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def four_workers() -> Iterator[WorkerGroup]:
    """Four gloo processes of one thread each."""
    group = WorkerGroup(4)
    yield group
    group.close()


@pytest.fixture(scope="session")
def alone() -> None:
    """This process is a gloo group of its own and computes with one thread."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture(autouse=True)
def groups_destroyed() -> Iterator[None]:
    """No group of this process outlives the test that made it."""
    yield
    if "torch.distributed" in sys.modules:
        from support.groups import destroy_groups

        destroy_groups()


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_of(family)` is the folder of a tiny model, made once."""
    from support.tiny_models import save_model
    from support.tokenizers import build_tokenizer

    folder = tmp_path_factory.mktemp("models")
    return lru_cache(lambda family: save_model(folder / family, build_tokenizer("byte_bpe"), family))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 60 rows, of which 54 train, 3 validate and 3 test."""
    from support.runs import write_rows

    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
