"""What a model folder holds beside its weights: configurations, tokenizer, its own code."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.export.merge import Merge
from tunesmith.export.source import locate_file

GENERATION_CONFIG = "generation_config.json"
_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def write_model_files(merge: Merge, files: ModelRef, tuned: Path, folder: Path) -> None:
    """Write everything but the weights and the model card into `folder`.

    Args:
        merge: the weights that go with it.
        files: the model whose files are taken: the base model, or a whole tuned one.
        tuned: the tuned model's folder; its tokenizer goes before the base model's.
        folder: the export.

    Raises:
        ModelError: the tokenizer can't be read.
    """
    _write_config(merge, folder)
    if (found := locate_file(files, GENERATION_CONFIG)) is not None:
        shutil.copyfile(found, folder / GENERATION_CONFIG)
    else:
        from transformers import GenerationConfig

        GenerationConfig.from_model_config(merge.model.config).save_pretrained(folder)
    for path in merge.source.folder.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    write_tokenizer(files, tuned, folder)


def write_tokenizer(files: ModelRef, tuned: Path, folder: Path) -> None:
    """Write the tokenizer, with its chat template, of the tuned model's folder; else that of `files`.

    Raises:
        ModelError: it can't be read.
    """
    from transformers import AutoTokenizer

    is_tuned = any((tuned / name).is_file() for name in _TOKENIZERS)
    source, revision = (tuned, None) if is_tuned else (files.source, files.revision)
    try:
        AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=files.trust_remote_code
        ).save_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"can't load the tokenizer of `{source}`: {str(error).strip().splitlines()[0]}",
            "check that the folder is complete",
        ) from error


def _write_config(merge: Merge, folder: Path) -> None:
    """Write the model's own configuration as it was published, but for the type and the tie of its weights."""
    content: dict[str, Any] = json.loads((merge.source.folder / "config.json").read_text(encoding="utf-8"))
    num_bytes: Counter[torch.dtype] = Counter()
    for tensor in merge.tensors.values():
        num_bytes[tensor.dtype] += tensor.nbytes if tensor.is_floating_point() else 0
    dtype = str(num_bytes.most_common(1)[0][0]).removeprefix("torch.")
    parts = [content, *(part for part in content.values() if isinstance(part, dict))]
    for part in parts:
        if part.pop("torch_dtype", None) is not None or "dtype" in part:
            part["dtype"] = dtype
        if merge.unties and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    content["dtype"] = dtype
    if merge.unties:
        content["tie_word_embeddings"] = False
    content.setdefault("architectures", [type(merge.model).__name__])
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
