"""A tokenizer's files as they were published: transformers would write them anew, in a form that others can't read.

Where training changed nothing, the base model's files are taken, byte for byte; where it has another chat template,
that alone is changed in them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.model.files.checks import read_object
from tunesmith.model.files.json_members import write_member
from tunesmith.model.files.side_files import CODE, TOKENIZER, VOCABULARIES, copy_files, find_files, list_files
from tunesmith.model.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_KEY = "chat_template"
_CONFIG = "tokenizer_config.json"
# Where processors and older tokenizers keep it.
_OTHER_PLACES = ("chat_template.json", "processor_config.json")


def write_tokenizer(
    tokenizer: PreTrainedTokenizerFast, ref: ModelRef, folder: Path, saved: Path | None = None
) -> None:
    """Write a tokenizer that was made from the model's own into `folder`.

    One that was changed is taken from the folder `saved`, where it lies already, or else written by transformers.

    Raises:
        ModelError: the model's own can't be read.
    """
    own = load_tokenizer(ref)
    if _vocabulary_of(own) == _vocabulary_of(tokenizer):
        brings_code = "auto_map" in own.init_kwargs
        copied = copy_files(ref, (*TOKENIZER, *(CODE if brings_code else ())), folder)
        template = tokenizer.chat_template
        if template == own.chat_template:
            template = None
        if template is not None:
            write_chat_template(template, folder)
        if _can_be_loaded(tokenizer, template, ref, folder):
            return
        # Some files mean a tokenizer only beside the model's configuration, which an adapter's folder lacks.
        for name in copied:
            (folder / name).unlink()
    if saved is not None:
        copy_files(ModelRef(saved), TOKENIZER, folder)
    else:
        tokenizer.save_pretrained(folder)
    _add_vocabularies(own, tokenizer, ref, folder)


def pack_tokenizer(tokenizer: PreTrainedTokenizerFast, ref: ModelRef) -> dict[str, bytes]:
    """Return what `write_tokenizer` writes, by the files' names: later on the hub may be out of reach.

    Raises:
        ModelError: the model's own can't be read.
    """
    with TemporaryDirectory() as place:
        folder = Path(place)
        write_tokenizer(tokenizer, ref, folder)
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def unpack_tokenizer(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files by their names into `folder`."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def copy_tokenizer(ref: ModelRef, tuned: Path, folder: Path) -> None:
    """Write into `folder` the tokenizer that lies in the folder `tuned`, else the model's.

    Raises:
        ModelError: it is absent, or can't be read.
    """
    if not holds_tokenizer(tuned):
        write_tokenizer(load_tokenizer(ref), ref, folder)
    elif ref.folder != tuned and find_files(ref, TOKENIZER):
        write_tokenizer(load_tokenizer(ref, tuned), ref, folder, saved=tuned)
    else:
        load_tokenizer(ref, tuned)  # refuses one that is torn
        copy_files(ModelRef(tuned), TOKENIZER, folder)


def holds_tokenizer(folder: Path) -> bool:
    """Tell whether a tokenizer lies in a folder."""
    return any(name == _CONFIG or name.startswith("tokenizer.") for name in list_files(folder, TOKENIZER))


def _vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return everything that decides which tokens a text becomes."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if not getattr(tokenizer, "is_fast", False):
        return [tokenizer.get_vocab(), special]
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # What an earlier call may have left behind; it isn't the tokenizer's own.
    backend["truncation"] = backend["padding"] = None
    return [backend, special]


def _can_be_loaded(
    tokenizer: PreTrainedTokenizerFast, template: str | dict[str, str] | None, ref: ModelRef, folder: Path
) -> bool:
    """Tell whether a folder's files make this tokenizer, and the chat template that was put into them."""
    try:
        found = load_tokenizer(ref, folder)
    except ModelError:
        return False
    is_same = _vocabulary_of(found) == _vocabulary_of(tokenizer)
    return is_same and template in (None, found.chat_template)


def write_chat_template(template: str | dict[str, str], folder: Path) -> None:
    """Put a chat template, or several by name, into a tokenizer's files, wherever they keep one.

    Raises:
        ModelError: one of them isn't valid.
    """
    shutil.rmtree(folder / _MORE_TEMPLATES, ignore_errors=True)
    named = template if isinstance(template, dict) else {"default": template}
    is_in_config = (folder / _CONFIG).is_file() and _KEY in read_object(folder / _CONFIG)
    if is_in_config:
        listed = [{"name": name, "template": text} for name, text in named.items()]
        write_member(folder / _CONFIG, _KEY, listed if isinstance(template, dict) else template)
    if not is_in_config or (folder / _TEMPLATE).is_file():
        for name, text in named.items():
            path = folder / (_TEMPLATE if name == "default" else f"{_MORE_TEMPLATES}/{name}.jinja")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())
    for name in _OTHER_PLACES:
        path = folder / name
        if "default" in named and path.is_file() and _KEY in read_object(path):
            write_member(path, _KEY, named["default"])


def _add_vocabularies(
    own: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast, ref: ModelRef, folder: Path
) -> None:
    """Add the vocabularies that other programs read, if the tokenizer has only more tokens than they."""
    if own.get_vocab().items() <= tokenizer.get_vocab().items():
        for name, path in find_files(ref, VOCABULARIES).items():
            if not (folder / name).exists():
                shutil.copyfile(path, folder / name)
