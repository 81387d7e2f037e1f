"""`final/`: the best checkpoint's adapter, or model, ready to use."""

from __future__ import annotations

import logging
import shutil
import uuid
from pathlib import Path

import torch

from tunesmith.config import TrainConfig
from tunesmith.model.load import load_model
from tunesmith.runs import (
    FORMAT_VERSION,
    ORIGIN_FILE,
    STATE_FILE,
    Checkpoint,
    RunDir,
    remove_folder,
    sync_files,
    write_json,
)
from tunesmith.train.checkpoint import STATE_FOLDER, read_weights

logger = logging.getLogger(__name__)


def write_final(run: RunDir, config: TrainConfig) -> Checkpoint:
    """Put the best checkpoint's adapter or model, and the tokenizer, into `final/`; return that checkpoint.

    The folder is whole or absent, and says in `tunesmith.json` which run and checkpoint it came from.
    """
    best = run.best_checkpoint()
    assert best is not None, "a finished run has a checkpoint"
    folder = run.final_path.with_name(f".{run.final_path.name}_{uuid.uuid4().hex[:8]}")
    shutil.copytree(best.path, folder, ignore=shutil.ignore_patterns(STATE_FOLDER, STATE_FILE, "params.json"))
    if config.full_ft:
        dtype: torch.dtype = getattr(torch, run.read_params()["resolved"]["dtype"])
        _write_model(config, best.path, folder, dtype)
    write_json(
        folder / ORIGIN_FILE,
        {
            "format_version": FORMAT_VERSION,
            "run": run.path.name,
            "checkpoint": best.path.name,
            "step": best.step,
            "eval_loss": best.eval_loss,
        },
    )
    sync_files(folder)
    if run.final_path.exists():
        remove_folder(run.final_path)
    folder.rename(run.final_path)
    which = "the last" if best.eval_loss is None else "the best"
    logger.info("`%s` holds step %d, %s of the run", run.final_path, best.step, which)
    return best


def _write_model(config: TrainConfig, checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    # The base model brings what isn't trained: buffers, generation settings.
    model = load_model(config, torch.device("cpu"))
    weights = {name: tensor.to(dtype) for name, tensor in read_weights(checkpoint).items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    model.save_pretrained(folder)
