"""Sizes as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.config import ConvertConfig
from tunesmith.config.layers import load_settings
from tunesmith.config.size import parse_size
from tunesmith.errors import ConfigError


def load(text: str, way: str, folder: Path) -> str:
    if way == "flag":
        return load_settings(ConvertConfig, None, {"max_shard_size": text}, {}, None).max_shard_size
    if way == "environment":
        return load_settings(ConvertConfig, None, {}, {"TUNESMITH_MAX_SHARD_SIZE": text}, None).max_shard_size
    (folder / "run.yaml").write_text(f"max_shard_size: {text}\n")
    return load_settings(ConvertConfig, folder / "run.yaml", {}, {}, None).max_shard_size


@pytest.mark.parametrize("way", ["flag", "environment", "yaml"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("500 MiB", 500 << 20),
        ("1.5kb", 1500),
        ("0.5TB", 5 * 10**11),
        ("1000000", 10**6),
        ("300B", 300),
    ],
)
def test_sizes_mean_thousands_or_powers_of_two(text: str, expected: int, way: str, tmp_path: Path) -> None:
    assert parse_size(load(text, way, tmp_path)) == expected


@pytest.mark.parametrize("way", ["flag", "environment", "yaml"])
@pytest.mark.parametrize(
    "text", ["0", "0GB", "0.0001KB", "-1", "1.5", "5XB", "GB", "5IB", "5GB 3MB", "true", "٥GB"]
)
def test_what_is_no_size_is_refused(text: str, way: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"as 5GB, 500MiB or 1000000|make it text"):
        load(text, way, tmp_path)


def test_a_whole_number_is_a_size_in_python_too() -> None:
    assert parse_size(ConvertConfig(max_shard_size=60_000).max_shard_size) == 60_000  # type: ignore[arg-type]
