"""An adapter by itself, as a PEFT folder: held against its base model first, then copied as it is."""

from __future__ import annotations

import filecmp
import json
import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from tunesmith.config import ModelRef
from tunesmith.errors import ExportError, ModelError
from tunesmith.export.generation import write_generation_config
from tunesmith.export.proof import Proof
from tunesmith.model.adapters.folder import count_rows, find_adapter_weights, read_adapter_shapes
from tunesmith.model.files.tokenizer_files import copy_tokenizer
from tunesmith.model.fit import check_adapter_fits
from tunesmith.model.load import build_meta_model, load_model_config
from tunesmith.runs.base_model import read_adapter_config
from tunesmith.runs.folder import ADAPTER_CONFIG
from tunesmith.runs.tuned import TunedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits its base model. `weights` is the file of its `num_weights` numbers.

    `rows` is how many the embeddings have to have under it, where the base model's have another number.
    """

    base: ModelRef
    weights: Path
    num_weights: int
    rows: int | None


def open_adapter(folder: Path, base: ModelRef) -> Adapter:
    """Return the adapter that lies in `folder`; reads names and shapes alone.

    Raises:
        ModelError: it has no weights, or torn ones, or wasn't made from `base`; or `base` is absent.
    """
    weights, shapes = find_adapter_weights(folder), read_adapter_shapes(folder)
    if not shapes:
        raise ModelError(f"`{weights}` holds no weights", "get the adapter again")
    model = build_meta_model(base, load_model_config(base))
    settings = read_adapter_config(folder)
    check_adapter_fits(model, shapes, str(base.source), settings)
    rows, own = count_rows(model, shapes, settings), model.get_input_embeddings().weight.shape[0]
    if rows != own:
        logger.info(
            "the adapter is for embeddings of %d rows, and the base model's have %d: README.md says how it is put on",
            rows,
            own,
        )
    return Adapter(base, weights, sum(map(math.prod, shapes.values())), rows if rows != own else None)


def write_adapter_folder(adapter: Adapter, tuned: TunedModel, folder: Path) -> None:
    """Write the weights, PEFT's settings, the tokenizer and the settings of generation into `folder`.

    Raises:
        ModelError: the settings or the tokenizer can't be read.
    """
    source, base = adapter.weights.parent, adapter.base
    shutil.copyfile(adapter.weights, folder / adapter.weights.name)
    settings = read_adapter_config(source)
    # PEFT finds a local base model by its path only.
    settings["base_model_name_or_path"] = str(base.folder.absolute() if base.folder else base.source)
    settings["revision"] = base.revision
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    copy_tokenizer(base, source, folder)
    write_generation_config(base, tuned, folder)


def prove_copy(adapter: Adapter, folder: Path) -> Proof:
    """Compare the weights in `folder` with the adapter's own, byte for byte.

    Raises:
        ExportError: they differ.
    """
    if not filecmp.cmp(adapter.weights, folder / adapter.weights.name, shallow=False):
        raise ExportError(
            f"the export isn't the adapter: its `{adapter.weights.name}` isn't that of `{adapter.weights.parent}`",
            "nothing was put in place; try again, and check the disk if it happens again",
        )
    return Proof("copied", adapter.num_weights, 0)
