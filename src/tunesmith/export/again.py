"""Whether the export that is asked for lies there already: what is recorded of each, and compared."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tunesmith.config import ConvertConfig, ModelRef
from tunesmith.config.size import parse_size
from tunesmith.model.files.fingerprint import model_fingerprint, sample_weights
from tunesmith.runs.folder import ADAPTER_CONFIG, ORIGIN_FILE, read_versioned_json
from tunesmith.runs.tuned import TunedModel

EXPORT = "export"


def record_of(tuned: TunedModel, config: ConvertConfig, proof: str | None) -> dict[str, Any]:
    """Return what tells one export from another: what it was made from and how; and what proved it."""
    return {
        "made_from": _digest(tuned),
        "no_merge": config.no_merge,
        "dtype": config.dtype,
        "max_shard_size": parse_size(config.max_shard_size),
        "proof": proof,
    }


def find_record(output: Path, tuned: TunedModel, config: ConvertConfig) -> dict[str, Any] | None:
    """Return the record of the export in `output` if it is what these settings ask for; else None.

    An export appears whole, so what has a record is finished.
    """
    if not (output / ORIGIN_FILE).is_file():
        return None
    record: dict[str, Any] | None = read_versioned_json(output / ORIGIN_FILE).get(EXPORT)
    if record is None or (config.verify and record["proof"] is None):
        return None
    asked = record_of(tuned, config, record["proof"])
    return record if record == asked else None


def _digest(tuned: TunedModel) -> str:
    """Return a digest of the tuned weights, and of the base model if they are changes of one."""
    digest = hashlib.blake2b(digest_size=16)
    base = ModelRef(tuned.folder) if tuned.kind == "model" else tuned.base
    assert base is not None, "only a whole model has no base"
    digest.update(model_fingerprint(base).encode())
    if tuned.kind != "model":
        patterns = (ADAPTER_CONFIG, "adapter_model.*", "state/*", "state/.metadata")
        for path in sorted({path for pattern in patterns for path in tuned.folder.glob(pattern)}):
            content = path.read_bytes() if path.name == ADAPTER_CONFIG else sample_weights(path)
            digest.update(f"{path.name}\0".encode() + content)
    return digest.hexdigest()
