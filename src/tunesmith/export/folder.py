"""A folder that appears whole or not at all."""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tunesmith.errors import ExportError, ResourceError, RunError
from tunesmith.runs import remove_folder, sync_files
from tunesmith.view.units import format_bytes

logger = logging.getLogger(__name__)

_MODEL_FILES = ("config.json", "adapter_config.json")


@contextmanager
def new_folder(output: Path, overwrite: bool, sources: Sequence[Path]) -> Iterator[Path]:
    """Yield a folder beside `output`, which gets that name when the body has ended without an error.

    What a killed process left beside `output` is removed first.

    Args:
        output: the folder's name at the end.
        overwrite: replace the model that `output` holds, once the new folder is whole.
        sources: what the body reads from; `output` must not be, or hold, any of them.

    Raises:
        RunError: `output` exists, or another process is writing it.
        ExportError: it can't be written.
    """
    _check_output(output, overwrite, sources)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output.with_name(f".{output.name}.lock"))
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"another conversion is writing `{output}`", "wait for it, or give another --output_dir"
        ) from None
    except OSError as error:
        raise ExportError(
            f"can't write beside `{output}`: {error.strerror or error}", "give another --output_dir"
        ) from error
    with lock:
        _remove_leftovers(output)
        folder = output.with_name(f".{output.name}_{uuid.uuid4().hex[:8]}")
        folder.mkdir()
        try:
            yield folder
            sync_files(folder)
            if output.exists():
                remove_folder(output)
            folder.rename(output)
        except OSError as error:
            raise ExportError(
                f"the export to `{output}` broke off: {error.strerror or error}",
                "nothing was put in place; check the free space and the folder's permissions",
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def check_space(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        ResourceError: it says what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ResourceError(
            f"the export takes {format_bytes(num_bytes)}, and `{folder.parent}` has {format_bytes(free)} free",
            "free some space, or give an --output_dir on another disk",
        )


def _check_output(output: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise RunError(
            f"`{output}` exists already", "give another --output_dir, or --overwrite to replace it"
        )
    for source in sources:
        if source.resolve().is_relative_to(output.resolve()):
            raise RunError(
                f"`{output}` holds what is to be exported, `{source}`", "give another --output_dir"
            )
    if not any((output / name).is_file() for name in _MODEL_FILES) and not _is_empty(output):
        raise RunError(f"`{output}` holds something else than a model", "give another --output_dir")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _remove_leftovers(output: Path) -> None:
    unfinished = re.compile(
        rf"\.{re.escape(output.name)}_[0-9a-f]{{8}}|\.removed_{re.escape(output.name)}_[0-9a-f]{{8}}"
    )
    for path in output.parent.iterdir():
        if unfinished.fullmatch(path.name):
            logger.info("removing what a conversion that broke off has left: `%s`", path)
            shutil.rmtree(path, ignore_errors=True)
