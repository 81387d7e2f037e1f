"""A tokenizer, opened; and why one can't be."""

from __future__ import annotations

import importlib.util
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import MISSING_PACKAGE_HINT, ModelError
from tunesmith.model.files.checks import AGAIN, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FILE, _VOCABULARY = "tokenizer.json", "tokenizer.model"
_BACKED = (_FILE, _VOCABULARY, "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def open_tokenizer(source: Path | str, **options: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a folder or of a model on the hub.

    Raises:
        ModelError: it is absent, torn, too new, or needs a package that isn't there.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **options)
    # The tokenizers library raises plain `Exception`; a tokenizer with code of its own, whatever it likes.
    except Exception as error:
        raise _explain(source, error) from error


def _explain(source: Path | str, error: Exception) -> ModelError:
    folder = source if isinstance(source, Path) else None
    place = folder or _cached_folder(source)
    if place is not None and (found := _explain_files(place, error)):
        return found
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if "untagged enum" in reason or "unknown variant" in reason:
        return _too_new(f"`{_FILE}` of `{source}`", reason)
    message = f"can't load the tokenizer of `{source}`: {reason}"
    if isinstance(error, ImportError):
        return ModelError(message, MISSING_PACKAGE_HINT)
    if folder is None:
        return ModelError(
            message,
            "check the model's name, the network, and HF_TOKEN for a gated model; or give --model_path",
        )
    return ModelError(
        message,
        "check that the folder is complete; --trust_remote_code allows a model that brings its own code",
    )


def _cached_folder(source: Path | str) -> Path | None:
    """Return where the hub's cache has the files of a model, as far as they were fetched."""
    from transformers.utils import cached_file

    for name in ("tokenizer_config.json", "config.json"):
        with suppress(OSError):
            options = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
            if found := cached_file(str(source), name, **options):
                return Path(found).parent
    return None


def _explain_files(folder: Path, error: Exception) -> ModelError | None:
    """Return what is wrong with the folder's files, if it can be told."""
    path = folder / _FILE
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as torn:
            return ModelError(f"`{path}` isn't valid JSON, or is torn: {torn}", AGAIN)
        if not isinstance(content, dict) or "model" not in content:
            return ModelError(f"`{path}` holds no tokenizer", AGAIN)
        return _too_new(f"`{path}`", str(error)) if type(error) is Exception else None
    if isinstance(error, ModuleNotFoundError) or not any((folder / name).is_file() for name in _BACKED):
        has_code = any(folder.glob("*.py"))
        if has_code or isinstance(error, ImportError):
            return None
        return ModelError(
            f"`{folder}` holds no tokenizer: neither {_FILE} nor {_VOCABULARY}",
            "put the tokenizer's files beside the model's",
        )
    for name in ("vocab.json", "merges.txt"):
        if (folder / name).is_file() and (fault := _fault_of(folder / name)):
            return fault
    return _lacks_package(folder)


def _fault_of(path: Path) -> ModelError | None:
    """Return what is wrong with a file of a vocabulary, if anything is."""
    try:
        if path.suffix == ".json":
            read_object(path)
        elif not path.read_text(encoding="utf-8").strip():
            return ModelError(f"`{path}` is empty", AGAIN)
    except ModelError as error:
        return error
    except UnicodeDecodeError as error:
        return ModelError(f"`{path}` isn't text: byte 0x{error.object[error.start]:02x} isn't UTF-8", AGAIN)
    return None


def _lacks_package(folder: Path) -> ModelError | None:
    """Return the error for a vocabulary without `tokenizer.json` that takes a package which isn't there."""
    vocabulary = folder / _VOCABULARY
    if not vocabulary.is_file():
        return None
    # tiktoken's files are lines of a token in base64 and its rank; SentencePiece's are binary.
    is_ranks = re.match(rb"[A-Za-z0-9+/]+=*[ \t]+\d+\r?\n", vocabulary.read_bytes()[:4096]) is not None
    packages = ("tiktoken",) if is_ranks else ("sentencepiece", "google.protobuf")
    missing = [name for name in packages if not _is_there(name)]
    if not missing:
        return None
    names = " and ".join(f"`{name.removeprefix('google.')}`" for name in missing)
    return ModelError(
        f"`{folder}` has no {_FILE}, and reading its {_VOCABULARY} takes the package {names}, which isn't installed",
        f"get the model's {_FILE}; or {MISSING_PACKAGE_HINT}",
    )


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of `google.protobuf`, its parent
        return False


def _too_new(called: str, reason: str) -> ModelError:
    import tokenizers

    return ModelError(
        f"{called} can't be read by the tokenizers library here ({tokenizers.__version__}): {reason}",
        "it was written by a newer version, or is damaged: install newer `tokenizers` and `transformers`, or "
        "download it again",
    )
