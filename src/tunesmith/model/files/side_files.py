"""What a model's folder holds beside weights and configuration: which files are of what kind.

Chosen by name, not by what is left over: a folder on a disk may hold things that were never meant to be passed on.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tunesmith.config import ModelRef
from tunesmith.model.files.weight_files import locate_file, refuse_without

logger = logging.getLogger(__name__)

# Vocabularies that are read by themselves, without what transformers makes of them: by llama.cpp, mistral-common, …
VOCABULARIES: tuple[str, ...] = (
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "*.spm",
    "*.vocab",
    "*.bpe",
    "bpe.codes",
)
VOCABULARIES += ("tekken.json", "vocab.json", "vocab.txt", "merges.txt", "dict.txt")
TEMPLATES = ("chat_template*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja")
TOKENIZER = ("*tokenizer*.json", "special_tokens_map.json", "added_tokens.json", *VOCABULARIES, *TEMPLATES)
# Of images, video and sound.
PROCESSORS = (
    "*processor*.json",
    "*processing*.json",
    "*feature_extractor*.json",
    "*feature_extraction*.json",
)
CODE = ("*.py",)
# The terms that whoever passes the model on must pass on with it.
TERMS = ("*license*", "*licence*", "*notice*", "*copying*", "*copyright*", "*policy*", "*terms*")
_NO_TEXT = (".py", ".json", ".jsonl", ".csv", ".parquet", ".safetensors", ".bin")


def copy_files(ref: ModelRef, patterns: Sequence[str], folder: Path) -> list[str]:
    """Copy the files of these kinds into `folder`, byte for byte; return their names.

    Raises:
        ModelError: the hub can't be reached, or has no such model.
    """
    found = find_files(ref, patterns)
    for name, path in found.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    return list(found)


def find_files(ref: ModelRef, patterns: Sequence[str]) -> dict[str, Path]:
    """Return the model's files of these kinds, by their names, fetching what the hub's cache lacks.

    Raises:
        ModelError: the hub can't be reached, or has no such model.
    """
    return list_files(ref.folder or _fetch(ref, patterns), patterns)


def list_files(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Return the files of these kinds in a folder, by their names."""
    paths = [
        path for pattern in ("*", "*/*.jinja") for path in sorted(folder.glob(pattern)) if path.is_file()
    ]
    by_name = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path for name, path in by_name.items() if _is_of(name, patterns)}


def _is_of(name: str, patterns: Sequence[str]) -> bool:
    if name.startswith("."):
        return False
    lower = name.lower()
    return any(
        fnmatchcase(lower, pattern) and not (pattern in TERMS and lower.endswith(_NO_TEXT))
        for pattern in patterns
        if pattern.count("/") == name.count("/")
    )


def _fetch(ref: ModelRef, patterns: Sequence[str]) -> Path:
    """Return the folder of the hub's cache that holds what the hub has of these kinds; offline, what was fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    config = locate_file(ref, "config.json") or refuse_without(ref, "config.json")
    spelled = [form for pattern in patterns for form in (pattern, pattern.upper(), pattern.title())]
    try:
        found = snapshot_download(
            str(ref.source), revision=ref.revision, allow_patterns=spelled, tqdm_class=NoBar
        )
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        logger.info("taking the files of `%s` that were fetched already: %s", ref.source, reason)
        return config.parent
    return Path(found)
