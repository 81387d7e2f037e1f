"""A folder that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from tunesmith.atomic_files import repair_folder, replace_folder
from tunesmith.errors import ConfigError, ExportError, ResourceError, RunError
from tunesmith.locks import Lock, Timeout
from tunesmith.paths import count_bytes, longest_name
from tunesmith.view.units import format_bytes

_ROOM_FOR_NAMES = len(".removed__12345678")
_RELEASED_WITHIN_S = 5  # a lock, once its process has been killed
_MODEL_FILES = ("config.json", "adapter_config.json")


@contextmanager
def new_folder(output: Path, overwrite: bool, sources: Sequence[Path]) -> Iterator[Path]:
    """Yield a folder beside `output`, which gets that name when the body has ended without an error.

    What a killed process left beside `output` is put right first.

    Args:
        output: the folder's name at the end.
        overwrite: replace the model that `output` holds, once the new folder is whole.
        sources: what the body reads from; `output` must not be, or hold, any of them.

    Raises:
        RunError: `output` exists, or another process is writing it.
        ExportError: it can't be written.
        LockError: the disk has no locks.
        ConfigError: the folder's name is too long.
    """
    _check_name(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        held = _lock_of(output).acquire(timeout=0)
    except Timeout:
        raise RunError(
            f"another conversion is writing `{output}`", "wait for it, or give another --output_dir"
        ) from None
    except OSError as error:
        raise _not_writable(output, error) from error
    with held:
        try:
            with replace_folder(output) as folder:
                # Not before: the folder that a killed conversion was to replace is back only now.
                _check_output(output, overwrite, sources)
                yield folder
        except OSError as error:
            raise ExportError(
                f"the export to `{output}` broke off: {error.strerror or error}",
                "nothing was put in place; check the free space and the folder's permissions",
            ) from error


def tidy(output: Path) -> None:
    """Put right what a killed conversion has left beside `output`, unless another one is writing it now."""
    with suppress(Timeout), _lock_of(output).acquire(timeout=_RELEASED_WITHIN_S):
        repair_folder(output)


@contextmanager
def mark_beside(output: Path) -> Iterator[Path]:
    """Give a new file beside `output`, by which another machine can tell whether it sees the same disk.

    Raises:
        ExportError: it can't be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        mark = NamedTemporaryFile(prefix=".", dir=output.parent)  # noqa: SIM115
    except OSError as error:
        raise _not_writable(output, error) from error
    with mark:
        yield Path(mark.name)


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


def _check_name(output: Path) -> None:
    """Refuse a name that leaves no room for those that the folder has while it is written."""
    longest = longest_name(output) - _ROOM_FOR_NAMES
    if (size := count_bytes(output.name)) > longest:
        raise ConfigError(
            f"`output_dir` has a name of {size} bytes, `{output.name}`: with what is written beside it, its disk "
            f"takes {longest}",
            "give an --output_dir with a shorter name",
        )


def _lock_of(output: Path) -> Lock:
    return Lock(output.with_name(f".{output.name}.lock"), "give an --output_dir on another disk")


def _not_writable(output: Path, error: OSError) -> ExportError:
    return ExportError(
        f"can't write beside `{output}`: {error.strerror or error}", "give another --output_dir"
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
