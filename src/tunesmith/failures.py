"""What a library's error means for the work that it ended, and what to do about it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunesmith.errors import MISSING_PACKAGE_HINT, TrainingError, TunesmithError
from tunesmith.runs.folder import RunDir

_MAX_REASON_CHARACTERS = 300
_FAILED_IMPORT = re.compile(r"(ModuleNotFoundError|ImportError): .+")
# Smallest change of the result first.
_SMALLER = (
    "set --gradient_checkpointing true; "
    "or halve --per_device_train_batch_size and double --gradient_accumulation_steps, which keeps the global batch; "
    "or lower --max_seq_length, or take more workers"
)


@dataclass(frozen=True)
class Work:
    """What a process does, as its errors call it: their classes, where it fails or is lost, and their hint."""

    name: str
    failed: type[TunesmithError]
    lost: type[TunesmithError]
    hint: str


def explain(error: Exception, work: Work) -> TunesmithError:
    """Return what a library's error means for the work."""
    failed_import = find_failed_import(error)
    if failed_import is not None:
        return work.failed(f"{work.name} failed: {failed_import}", MISSING_PACKAGE_HINT)
    return work.failed(f"{work.name} failed: {type(error).__name__}: {line_of(error, 0)}", work.hint)


def explain_training(cause: BaseException, run: RunDir) -> TunesmithError:
    """Return what the error that ended a training means for its run."""
    if isinstance(cause, TunesmithError):
        return cause
    failed_import = find_failed_import(cause)
    if failed_import is not None:
        return TrainingError(f"training failed: {failed_import}", MISSING_PACKAGE_HINT)
    latest = run.latest_checkpoint()
    hint = f"the same command goes on from step {latest.step}" if latest else "no checkpoint was written yet"
    if _ran_out_of_memory(cause):
        hint = f"{_SMALLER}; {hint}"
    return TrainingError(
        f"training failed: {type(cause).__name__}: {cause}", f"{hint}; the log is `{run.log_path()}`"
    )


def find_failed_import(error: BaseException) -> str | None:
    """Return the failed import that an error is, or that the traceback in its text ends with."""
    if isinstance(error, ImportError):
        return f"{type(error).__name__}: {error}"
    # Where a process couldn't even read its task, Ray hands over the text alone.
    found = _FAILED_IMPORT.fullmatch(line_of(error, -1))
    return found[0] if found else None


def line_of(error: BaseException, number: int) -> str:
    """Return a line of an error's text, cut to a readable length."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[number].strip()[:_MAX_REASON_CHARACTERS]


def _ran_out_of_memory(error: BaseException) -> bool:
    """Return whether torch had none, of a GPU or of the host, or Ray ended a worker for the host's sake."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
