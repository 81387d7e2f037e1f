"""`final/`: the best checkpoint's adapter, or model, ready to use."""

from __future__ import annotations

import logging
import shutil
import uuid
from pathlib import Path

import torch

from tunesmith.config import TrainConfig
from tunesmith.model.load import build_meta_model, load_model_config, resolve_dtype
from tunesmith.runs import FORMAT_VERSION, STATE_FILE, Checkpoint, RunDir, remove_folder, write_json
from tunesmith.train.checkpoint import STATE_FOLDER, read_weights

logger = logging.getLogger(__name__)


def write_final(run: RunDir, config: TrainConfig, device_type: str) -> Checkpoint:
    """Put the best checkpoint's adapter or model, and the tokenizer, into `final/`; return that checkpoint.

    The folder is whole or absent, and says in `tunesmith.json` which run and checkpoint it came from.
    """
    best = run.best_checkpoint()
    assert best is not None, "a finished run has a checkpoint"
    folder = run.final_path.with_name(f".{run.final_path.name}_{uuid.uuid4().hex[:8]}")
    shutil.copytree(best.path, folder, ignore=shutil.ignore_patterns(STATE_FOLDER, STATE_FILE, "params.json"))
    if config.full_ft:
        _write_model(config, best.path, folder, resolve_dtype(config, torch.device(device_type)))
    write_json(
        folder / "tunesmith.json",
        {
            "format_version": FORMAT_VERSION,
            "run": str(run.path),
            "checkpoint": best.path.name,
            "step": best.step,
            "eval_loss": best.eval_loss,
        },
    )
    if run.final_path.exists():
        remove_folder(run.final_path)
    folder.rename(run.final_path)
    logger.info("`%s` holds step %d, the best of the run", run.final_path, best.step)
    return best


def _write_model(config: TrainConfig, checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    model = build_meta_model(config, load_model_config(config))
    weights = {name: tensor.to(dtype) for name, tensor in read_weights(checkpoint).items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    model.save_pretrained(folder)
