"""generation_config.json: the base model's, and the tokens that training taught to end with."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tunesmith.config import ModelRef
from tunesmith.data.end_tokens import find_end_tokens
from tunesmith.model.files.checks import GENERATION_CONFIG, read_object
from tunesmith.model.files.json_members import set_member
from tunesmith.model.files.tokenizer_files import holds_tokenizer
from tunesmith.model.files.weight_files import locate_file
from tunesmith.model.load import load_model_config, load_tokenizer
from tunesmith.runs.tuned import TunedModel

logger = logging.getLogger(__name__)

_ENDS = "eos_token_id"


def write_generation_config(base: ModelRef, tuned: TunedModel, folder: Path) -> None:
    """Write the settings of `base`, whose other bytes stay, with the end tokens that training taught beside its own.

    Whoever generates stops at these alone: a base model that was tuned on chats would else go on behind its answers.

    Raises:
        ModelError: the base model's file, or the tokenizer in `folder`, can't be read.
    """
    found = locate_file(base, GENERATION_CONFIG)
    text = found.read_bytes().decode("utf-8") if found is not None else _make_text(base)
    content = json.loads(text) if found is None else read_object(found)
    own = _as_list(content.get(_ENDS))
    before = own or _as_list(getattr(load_model_config(base).get_text_config(), _ENDS, None))
    trained = trained_end_tokens(base, tuned, folder)
    added = [token for token in trained if token not in before]
    if trained and (added or not own):
        ends = added + before
        text = set_member(text, _ENDS, ends if len(ends) > 1 else ends[0])
    if added:
        tokenizer = load_tokenizer(base, folder)
        names = ", ".join(f"`{tokenizer.convert_ids_to_tokens(token)}`" for token in added)
        logger.info("%s names what the training taught to end with: %s", GENERATION_CONFIG, names)
    (folder / GENERATION_CONFIG).write_bytes(text.encode("utf-8"))


def trained_end_tokens(base: ModelRef, tuned: TunedModel, tokenizer_folder: Path) -> list[int]:
    """Return the tokens that the trained answers end with, as recorded or as the prepared data show them.

    For what no run recorded they are those that its own folder names.
    """
    if tuned.params is None:
        return _named_beside(base, tuned)
    data = tuned.params["data"]
    if "end_tokens" in data:
        return list(data["end_tokens"])
    # Earlier versions didn't record them. The home may be mounted elsewhere by now.
    prepared = Path(data["folder"])
    for place in (prepared, *([tuned.data_dir / prepared.name] if tuned.data_dir else [])):
        if (place / "training.arrow").is_file():
            tokenizer = load_tokenizer(base, tokenizer_folder)
            length = int(tuned.params["settings"]["max_seq_length"])
            return list(find_end_tokens(place / "training.arrow", tokenizer, length))
    logger.warning(
        "the run didn't record which tokens end its answers, and its prepared data are gone: %s names those of the "
        "base model alone",
        GENERATION_CONFIG,
    )
    return []


def _named_beside(base: ModelRef, tuned: TunedModel) -> list[int]:
    """Return the end tokens that the folder of an adapter names; a whole model's own file is taken as it is."""
    if tuned.kind != "adapter":
        return []
    ends: list[int] = []
    if (tuned.folder / GENERATION_CONFIG).is_file():
        ends += _as_list(read_object(tuned.folder / GENERATION_CONFIG).get(_ENDS))
    if holds_tokenizer(tuned.folder):
        ends += _as_list(load_tokenizer(base, tuned.folder).eos_token_id)
    return list(dict.fromkeys(ends))


def _make_text(base: ModelRef) -> str:
    """Return what transformers makes of the configuration of a model that comes without the file."""
    from transformers import GenerationConfig

    content: dict[str, Any] = GenerationConfig.from_model_config(load_model_config(base)).to_diff_dict()
    # Else earlier versions of transformers make it anew, without what is added here.
    content.pop("_from_model_config", None)
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _as_list(ends: Any) -> list[int]:
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list) else [ends]
