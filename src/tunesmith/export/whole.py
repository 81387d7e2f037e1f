"""A tuned model as a folder of whole weights that is kept and used again, for what can't be served as an adapter."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from tunesmith.config import ConvertConfig
from tunesmith.export.convert import export
from tunesmith.model.files.fingerprint import model_fingerprint, sample_weights
from tunesmith.paths import expand_user
from tunesmith.runs.folder import ORIGIN_FILE, read_versioned_json
from tunesmith.runs.tuned import TunedModel

logger = logging.getLogger(__name__)

_WHOLE_FILE_BYTES = 1 << 30


def find_whole(tuned: TunedModel) -> Path | None:
    """Return the tuned model's own folder, or `final/`, where that holds whole weights."""
    if tuned.kind == "model":
        return tuned.folder
    if tuned.run is None or not (tuned.run.final_path / ORIGIN_FILE).is_file():
        return None
    origin = read_versioned_json(tuned.run.final_path / ORIGIN_FILE)
    is_this = (origin["run"], origin["checkpoint"]) == (tuned.run.path.name, tuned.folder.name)
    return tuned.run.final_path if is_this and (tuned.run.final_path / "config.json").is_file() else None


def keep_whole(tuned: TunedModel, home: Path | None, reason: str) -> Path:
    """Return a folder of the tuned model's whole weights: one that there is, else an export, which is made once.

    It lies in the run, or without one under `home`. `reason` says why it is needed.

    Raises:
        Else as `export.convert.export`.
    """
    found = find_whole(tuned)
    if found is not None:
        return found
    assert tuned.base is not None, "only a whole model has no base"
    digest = hashlib.blake2b(
        f"{weights_digest(tuned)} {model_fingerprint(tuned.base)}".encode(), digest_size=4
    )
    name = f"{tuned.folder.name}-{digest.hexdigest()}"
    folder = (
        tuned.run.serving_path(name)
        if tuned.run
        else expand_user(home or "runs").absolute() / "serving" / name
    )
    if folder.is_dir():
        logger.info("taking `%s`, which an earlier call has exported", folder)
        return folder
    logger.info("exporting %s to `%s`, because %s", tuned.label, folder, reason)
    trusts = tuned.base.trust_remote_code
    return export(tuned, ConvertConfig(trust_remote_code=trusts), folder).folder


def weights_digest(tuned: TunedModel) -> str:
    """Return a digest of the tuned weights: of an adapter's whole files, of place, time and samples of larger ones."""
    digest = hashlib.blake2b(digest_size=16)
    patterns = ("*.safetensors", "*.bin", "adapter_config.json", "state/*", "state/.metadata")
    for path in sorted({path for pattern in patterns for path in tuned.folder.glob(pattern)}):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size}\0".encode())
        if tuned.kind == "adapter" and stat.st_size <= _WHOLE_FILE_BYTES:
            digest.update(path.read_bytes())
        else:
            digest.update(f"{path.resolve()} {stat.st_mtime_ns}\0".encode() + sample_weights(path))
    return digest.hexdigest()
