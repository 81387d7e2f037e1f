"""What tells one model from another without reading all of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tunesmith.config import ModelRef
from tunesmith.model.load import find_weight_files, load_model_config

# Names the way a local folder's digest is made; without it, the way of the first runs.
_FORM = "v2-"
_HEAD_BYTES = 1 << 20
_SAMPLE_BYTES = 64
_SAMPLES_OF_A_FILE = 4096


def model_fingerprint(ref: ModelRef, like: str | None = None) -> str:
    """Return the hub's commit of the model, or a digest of a local folder's config and weight files.

    Of the weights, the digest takes each file's name, size and head and a few bytes of every tensor: reading
    100 GB to start a run would be absurd. With `like`, a fingerprint that was recorded earlier, it is made in
    the way that one was, so that the two can be compared.
    """
    from transformers.utils import cached_file, extract_commit_hash

    config_file = cached_file(str(ref.source), "config.json", revision=ref.revision or "main")
    # The configuration doesn't say which commit it came from, but its place in the hub's cache does.
    commit = extract_commit_hash(config_file, None) if ref.folder is None else None
    if commit is not None:
        return str(commit)
    if like is not None and not like.startswith(_FORM):
        return _first_form(ref)
    digest = hashlib.sha256(Path(config_file).read_bytes())
    for path in find_weight_files(Path(config_file).parent):
        digest.update(f"{path.name}\0".encode() + sample_weights(path))
    return f"{_FORM}{digest.hexdigest()[:16]}"


def sample_weights(path: Path) -> bytes:
    """Return a digest of a weight file's size, its head, and bytes from the begin, middle and end of each tensor.

    Of a file that isn't safetensors, where tensors aren't told apart, the samples are spread evenly.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        head = os.pread(file.fileno(), 8, 0)
        num_tensors_head = 8 + int.from_bytes(head, "little")
        # A stale file that is torn is no fault of the model, whose weights lie in others.
        is_safetensors = path.suffix == ".safetensors" and num_tensors_head <= size
        num_head = num_tensors_head if is_safetensors else _HEAD_BYTES
        head = os.pread(file.fileno(), num_head, 0)
        digest = hashlib.blake2b(f"{size}\0".encode() + head, digest_size=16)
        for offset in _tensor_offsets(head) if is_safetensors else range(0, size, _stride(size)):
            digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))
    return digest.digest()


def _tensor_offsets(head: bytes) -> Iterator[int]:
    """Yield where the samples of each tensor of a safetensors file begin."""
    for name, tensor in json.loads(head[8:]).items():
        if name != "__metadata__":
            begin, end = (len(head) + offset for offset in tensor["data_offsets"])
            last = max(begin, end - _SAMPLE_BYTES)
            yield from (begin, (begin + last) // 2, last)


def _stride(size: int) -> int:
    return max(_SAMPLE_BYTES, size // _SAMPLES_OF_A_FILE)


def _first_form(ref: ModelRef) -> str:
    """Return the digest that the first runs recorded: of each weight file, its first MiB alone."""
    # Not the path, which may be spelt in many ways.
    content = {
        key: value for key, value in load_model_config(ref).to_dict().items() if key != "_name_or_path"
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    for path in find_weight_files(Path(ref.source)):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()[:16]
