"""`final/`: the best checkpoint's adapter, or model, ready to use."""

from __future__ import annotations

import logging
import shutil

import torch

from tunesmith.atomic_files import replace_folder
from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.export.generation import write_generation_config
from tunesmith.export.merge import open_merge
from tunesmith.export.model_files import write_model_files
from tunesmith.export.origin import write_origin
from tunesmith.export.shards import write_shards
from tunesmith.model.files.checks import GENERATION_CONFIG
from tunesmith.model.files.state import STATE_FOLDER
from tunesmith.runs.base_model import recorded_settings
from tunesmith.runs.folder import STATE_FILE, Checkpoint, RunDir
from tunesmith.runs.tuned import Kind, TunedModel

logger = logging.getLogger(__name__)

_MAX_SHARD_SIZE = "5GB"


def write_final(run: RunDir, base: ModelRef) -> Checkpoint:
    """Put the best checkpoint's adapter or model, and the tokenizer, into `final/`; return that checkpoint.

    The folder is whole or absent, and says in `tunesmith.json` which run and checkpoint it came from.
    """
    best = run.best_checkpoint()
    assert best is not None, "a finished run has a checkpoint"
    params = run.read_params()
    recorded = recorded_settings(params)
    kind: Kind = "state" if recorded.full_ft else "adapter"
    tuned = TunedModel(kind, best.path, base, run, params, best.step, best.eval_loss, dataset=recorded)
    with replace_folder(run.final_path) as folder:
        if recorded.full_ft:
            dtype: torch.dtype = getattr(torch, params["resolved"]["dtype"])
            merge = open_merge(tuned, base, dtype)
            write_shards(merge, folder, _MAX_SHARD_SIZE)
            write_model_files(merge, base, tuned, folder)
        else:
            ignored = shutil.ignore_patterns(STATE_FOLDER, STATE_FILE, "params.json")
            shutil.copytree(best.path, folder, ignore=ignored, dirs_exist_ok=True)
            try:
                write_generation_config(base, tuned, folder)
            except (
                ModelError,
                OSError,
            ) as error:  # the training is done, and the hub may be out of reach by now
                logger.warning("`%s` goes without %s: %s", run.final_path, GENERATION_CONFIG, error)
        write_origin(tuned, folder)
    which = "the last" if best.eval_loss is None else "the best"
    logger.info("`%s` holds step %d, %s of the run", run.final_path, best.step, which)
    return best
