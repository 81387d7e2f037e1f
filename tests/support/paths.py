"""Where things lie."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent
SHARED = REPOSITORY.parent / "shared"
"""Data for trials that may lie beside the repository."""
