"""Ranks wait equally long for one another, whichever process group they wait in."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tunesmith
from tunesmith.parallel.mesh import build_mesh
from tunesmith.parallel.timeouts import GROUP_TIMEOUT

PACKAGE = Path(tunesmith.__file__).parent
MAKERS = {"new_group": "timeout", "init_process_group": "timeout", "TorchConfig": "timeout_s"}


def made_groups() -> dict[str, list[str]]:
    """Return where the package makes process groups, and what it says of their time-outs."""
    found: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = (
                getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            )
            if name in MAKERS:
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                found.setdefault(path.stem, []).append(said.get(MAKERS[name], "torch's own"))
    return found


def test_every_group_is_made_with_the_one_timeout() -> None:
    groups = made_groups()
    assert {"mesh", "checkpoint", "ray_train"} <= groups.keys()
    assert [said for each in groups.values() for said in each if "GROUP_TIMEOUT" not in said] == []


@pytest.mark.usefixtures("alone")
def test_a_group_of_gloo_s_has_it() -> None:
    backend = build_mesh(0, 1).group._get_backend(torch.device("cpu"))
    assert backend.options._timeout == GROUP_TIMEOUT
    others = dist.new_group(backend="gloo")._get_backend(torch.device("cpu"))
    assert others.options._timeout != GROUP_TIMEOUT


@pytest.mark.usefixtures("alone")
def test_the_groups_that_weights_are_sharded_in_have_it() -> None:
    ranks = build_mesh(0, 1).lay_out_weights(torch.device("cpu"), 1)
    for group in ranks.get_all_groups():
        assert group._get_backend(torch.device("cpu")).options._timeout == GROUP_TIMEOUT
