"""A data set whose rows a function of the user's has made into text: converted once, then a file like any other."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.atomic_files import write_text
from tunesmith.config import TrainConfig
from tunesmith.data.sources import describe_source, read_rows, source_fingerprint
from tunesmith.errors import ConfigError, DataError
from tunesmith.paths import expand_user

logger = logging.getLogger(__name__)

Converter = Callable[[dict[str, Any]], dict[str, Any]]


def write_converted(config: TrainConfig, convert: Converter) -> tuple[Path, bool]:
    """Write the converted rows below `config.home`, unless they are there, as JSON lines.

    Returns the file, and whether its rows hold `input` and `output` rather than `messages`. The name follows
    from the data set and the source file of `convert`: another converter makes another file.

    Raises:
        ConfigError: there are several data sets.
        DataError: the data set can't be read, or the converter fails or returns something else.
    """
    if config.datasets is not None:
        raise ConfigError(
            f"`{convert.__name__}` converts one data set, and `datasets` holds {len(config.datasets)}",
            "give one data set, or leave the converter out and give each of them its templates",
        )
    assert config.home is not None, "the scripts give a home"
    digest = hashlib.blake2b(digest_size=8)
    for part in (source_fingerprint(config), config.split, _source_of(convert)):
        digest.update(f"{part}\0".encode())
    path = expand_user(config.home).absolute() / "datasets" / f"converted-{digest.hexdigest()}.jsonl"
    if not path.exists():
        logger.info("converting %s with `%s`", describe_source(config), convert.__name__)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _convert_rows(config, convert))
    logger.info("the rows are those that `%s` has made, in `%s`: no templates", convert.__name__, path)
    with path.open(encoding="utf-8") as file:
        return path, "messages" not in json.loads(file.readline())


def _source_of(convert: Converter) -> str:
    file = inspect.getsourcefile(convert)
    return Path(file).read_text(encoding="utf-8") if file else repr(convert)


def _convert_rows(config: TrainConfig, convert: Converter) -> Iterator[str]:
    for where, row in read_rows(config):
        try:
            converted = convert(row)
        except Exception as error:  # whatever a user's function raises
            raise DataError(
                f"`{convert.__name__}` fails on {where}: {type(error).__name__}: {error}",
                f"the row's columns are {', '.join(f'`{name}`' for name in row)}",
            ) from error
        if not isinstance(converted, dict) or not (
            {"input", "output"} <= set(converted) or "messages" in converted
        ):
            raise DataError(
                f"`{convert.__name__}` returns {converted!r:.80} for {where}",
                'it must return {"input": …, "output": …} or {"messages": […]}',
            )
        yield json.dumps(converted, ensure_ascii=False) + "\n"
