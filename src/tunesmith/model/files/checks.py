"""The small files of a model's folder, looked at before a library reads them: a fault is told by file and field."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.runs.folder import ADAPTER_CONFIG

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
AGAIN = "download it again"
_GET_AGAIN = "download the model again; or mend the file"

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md: what stands in place of a file that wasn't fetched.
_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_POINTER_BYTES = 1024
_OBJECTS = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_OTHERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
# Of weights, what transformers takes first: what lies beside it may be stale, and does no harm.
_WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)

# transformers takes whatever stands in generation_config.json and fails, if at all, at the first answer.
_NUMBERS = (
    "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "length_penalty", "guidance_scale", "max_time", "penalty_alpha", "diversity_penalty",
)  # fmt: skip
_WHOLE_NUMBERS = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k",
    "no_repeat_ngram_size", "pad_token_id", "bos_token_id", "forced_bos_token_id", "decoder_start_token_id",
)  # fmt: skip
_SWITCHES = (
    "do_sample",
    "use_cache",
    "renormalize_logits",
    "remove_invalid_values",
    "return_dict_in_generate",
)
_TOKENS = ("eos_token_id", "forced_eos_token_id")


def check_files(folder: Path) -> None:
    """Refuse a folder with a file that isn't what its name says. Cheap: it reads small files alone.

    Raises:
        ModelError: it names the file, and what is wrong with it.
    """
    found = ([path for pattern in way for path in sorted(folder.glob(pattern))] for way in _WEIGHTS)
    weights = next(filter(None, found), [])
    for path in [*(folder / name for name in (*_OBJECTS, *_OTHERS)), *weights]:
        refuse_pointer(path)
    for name in _OBJECTS:
        if (folder / name).is_file():
            read_object(folder / name)
    for path in weights:
        if path.suffix == ".json":
            _check_index(path)
    check_generation_config(folder / GENERATION_CONFIG)


def refuse_adapter(folder: Path, called: str | None = None) -> None:
    """Refuse a folder with an adapter in it as a model: transformers would put it on the weights beside it.

    Raises:
        ModelError: it holds one.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    called = called or str(folder)
    onward = "to go on from the adapter, give its base model, and the adapter as `train --adapter_path`"
    if (folder / CONFIG).is_file():
        raise ModelError(
            f"`{called}` holds a model and an adapter, `{ADAPTER_CONFIG}`: it can't be told which is meant",
            f"move {ADAPTER_CONFIG} and adapter_model.* out of it to take the model's weights as they are; {onward}",
        )
    raise ModelError(f"`{called}` holds an adapter, `{ADAPTER_CONFIG}`, and no model", onward)


def refuse_pointer(path: Path) -> None:
    """Refuse a file in whose place Git left a pointer.

    Raises:
        ModelError: it is one.
    """
    if not path.is_file() or path.stat().st_size > _LONGEST_POINTER_BYTES:
        return
    if path.read_bytes().startswith(_POINTER):
        raise ModelError(
            f"`{path}` is a Git LFS pointer, not the file itself",
            "`git lfs pull` in its folder gets the file; or download the model again",
        )


def refuse_torn_pickle(path: Path) -> None:
    """Refuse a `.bin` file of weights that was cut off; cheap, as the list of what it holds stands at its end.

    Raises:
        ModelError: it is torn.
    """
    with path.open("rb") as file:
        head = file.read(2)
    # Those of torch before 1.6 are no zip files.
    if not head or (head == b"PK" and not zipfile.is_zipfile(path)):
        raise ModelError(f"`{path}` is not a whole file of weights", AGAIN)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        ModelError: it holds none.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"`{path}` can't be read: {error.strerror or error}", "check its permissions"
        ) from error
    if not raw.strip():
        raise ModelError(f"`{path}` is empty", _GET_AGAIN)
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ModelError(
            f"`{path}` begins with a byte-order mark",
            "save it as UTF-8 without one; or download the model again",
        )
    try:
        content = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ModelError(
            f"`{path}` isn't text: byte 0x{raw[error.start]:02x} isn't UTF-8", _GET_AGAIN
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"`{path}` isn't valid JSON, or is torn: {error}", _GET_AGAIN) from error
    if not isinstance(content, dict):
        raise ModelError(f"`{path}` holds no settings: it must be a JSON object, `{{…}}`", _GET_AGAIN)
    return content


def _check_index(path: Path) -> None:
    files = read_object(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(f"`{path}` has no `weight_map` from weights to files", AGAIN)


def check_generation_config(path: Path) -> None:
    """Refuse settings of generation, if there are any, that no answer can be made with.

    Raises:
        ModelError: it names the setting.
    """
    if not path.is_file():
        return
    from transformers import GenerationConfig

    content = read_object(path)
    for name, wanted in _wrong_fields(content):
        raise ModelError(
            f"`{path}`: `{name}` is `{json.dumps(content[name])}`, and must be {wanted}", "mend the file"
        )
    try:
        GenerationConfig.from_dict(content)
    except Exception as error:  # its checks compare whatever they find
        reason = " ".join(str(error).split())
        raise ModelError(
            f"`{path}` holds what no answer can be made with: {reason}",
            "mend the file, or take that setting out",
        ) from error


def _wrong_fields(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the fields of a generation config that have another type than answers are made with, and which."""
    for name, value in content.items():
        if value is None:
            continue
        if name in _NUMBERS and not _is_number(value):
            yield name, "a number"
        elif name in _WHOLE_NUMBERS and not (_is_number(value) and float(value).is_integer()):
            yield name, "a whole number"
        elif name in _SWITCHES and not isinstance(value, bool):
            yield name, "true or false"
        elif name in _TOKENS:
            tokens = value if isinstance(value, list) else [value]
            if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
                yield name, "a token's number, or a list of them"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
