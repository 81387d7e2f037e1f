"""`final/`: the best checkpoint's adapter, or model, ready to use."""

from __future__ import annotations

import logging
import shutil
import uuid

import torch

from tunesmith.config import TrainConfig
from tunesmith.export.merge import open_merge
from tunesmith.export.model_files import write_model_files
from tunesmith.export.shards import write_shards
from tunesmith.model.state import STATE_FOLDER
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
from tunesmith.tuned import TunedModel

logger = logging.getLogger(__name__)

_MAX_SHARD_SIZE = "5GB"


def write_final(run: RunDir, config: TrainConfig) -> Checkpoint:
    """Put the best checkpoint's adapter or model, and the tokenizer, into `final/`; return that checkpoint.

    The folder is whole or absent, and says in `tunesmith.json` which run and checkpoint it came from.
    """
    best = run.best_checkpoint()
    assert best is not None, "a finished run has a checkpoint"
    folder = run.final_path.with_name(f".{run.final_path.name}_{uuid.uuid4().hex[:8]}")
    if config.full_ft:
        dtype: torch.dtype = getattr(torch, run.read_params()["resolved"]["dtype"])
        merge = open_merge(TunedModel("state", best.path, config), config, dtype)
        folder.mkdir()
        write_shards(merge, folder, _MAX_SHARD_SIZE)
        write_model_files(merge, config, best.path, folder)
    else:
        ignored = shutil.ignore_patterns(STATE_FOLDER, STATE_FILE, "params.json")
        shutil.copytree(best.path, folder, ignore=ignored)
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
