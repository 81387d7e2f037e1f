"""Rows of a table of which a few are tried each time, and all by `make test-long`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def long_but(kept: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Return the names as parameters of a test: those that aren't kept are marked as long."""
    names, kept = list(names), set(kept)
    assert kept <= set(names), f"there is no {', '.join(sorted(kept - set(names)))}"
    return [name if name in kept else pytest.param(name, marks=pytest.mark.long) for name in names]
