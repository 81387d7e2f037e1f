"""What a model folder holds beside its weights: configurations, tokenizer, its own code."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tunesmith.config import ModelRef
from tunesmith.export.generation import write_generation_config
from tunesmith.export.merge import Merge
from tunesmith.model.files.side_files import CODE, PROCESSORS, TERMS, copy_files
from tunesmith.model.files.tokenizer_files import copy_tokenizer
from tunesmith.runs.tuned import TunedModel


def write_model_files(merge: Merge, files: ModelRef, tuned: TunedModel, folder: Path) -> None:
    """Write everything but the weights and the model card into `folder`.

    Args:
        merge: the weights that go with it.
        files: the model whose files are taken: the base model, or a whole tuned one.
        tuned: what is exported; its tokenizer goes before the base model's.
        folder: the export.

    Raises:
        ModelError: the tokenizer can't be read.
    """
    _write_config(merge, folder)
    copy_files(files, (*PROCESSORS, *CODE, *TERMS), folder)
    copy_tokenizer(files, tuned.folder, folder)
    write_generation_config(files, tuned, folder)


def _write_config(merge: Merge, folder: Path) -> None:
    """Write the model's own configuration as it was published, but for its weights' type, tie and vocabulary."""
    content: dict[str, Any] = json.loads((merge.source.folder / "config.json").read_text(encoding="utf-8"))
    num_bytes: Counter[torch.dtype] = Counter()
    for tensor in merge.tensors.values():
        num_bytes[tensor.dtype] += tensor.nbytes if tensor.is_floating_point() else 0
    dtype = str(num_bytes.most_common(1)[0][0]).removeprefix("torch.")
    vocab_size = merge.changes.vocab_size
    parts = [content, *(part for part in content.values() if isinstance(part, dict))]
    for part in parts:
        if part.pop("torch_dtype", None) is not None or "dtype" in part:
            part["dtype"] = dtype
        if merge.unties and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
        if vocab_size is not None and "vocab_size" in part:
            part["vocab_size"] = vocab_size
    content["dtype"] = dtype
    if vocab_size is not None and not any("vocab_size" in part for part in parts):
        content["vocab_size"] = vocab_size
    if merge.unties:
        content["tie_word_embeddings"] = False
    content.pop("transformers_weights", None)  # the name of the base's weight file
    content.setdefault("architectures", [type(merge.model).__name__])
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
