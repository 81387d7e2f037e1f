"""Training under Ray Train: its trainer, and its workers. The only import of ray.train."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cluster.local_ray import ray_at_hand
from tunesmith.cluster.remote import first_cause
from tunesmith.cluster.resources import Allocation, is_elastic
from tunesmith.compat import trainer_without_cleaner
from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.failures import explain_training
from tunesmith.logs import log_to_file
from tunesmith.model.chat_template import read_if_file
from tunesmith.parallel.timeouts import GROUP_TIMEOUT
from tunesmith.runs.folder import RunDir
from tunesmith.runs.metrics_log import find_ending, newest_attempt
from tunesmith.train.worker import TrainJob

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 600
# A node of the cloud's has to come up, and to load the image.
_ELASTIC_START_TIMEOUT_S = 1800
_POLL_S = 0.25
_COMMIT = re.compile("[0-9a-f]{40}")
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"


def train_on_ray(
    job: TrainJob, allocation: Allocation, note: Callable[[str], None], poll: Callable[[], None]
) -> dict[str, Any]:
    """Train on the Ray that this process is connected to, else on one of its own; return the event that ended it.

    `note` is told what is being done. `poll` is called about four times a second; what it raises ends the waiting.

    Raises:
        TunesmithError: the workers broke off before they could record an ending.
    """
    import ray

    # Ray's own list of checkpoints: it refuses to start when one of them was rotated away. Ours is the folder.
    (job.run.path / _RAY_SNAPSHOT).unlink(missing_ok=True)
    # Of an elastic cluster's idle workers, too, some may have gone while the data was prepared.
    timeout_s = _ELASTIC_START_TIMEOUT_S if is_elastic() else _START_TIMEOUT_S
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(timeout_s))
    attempts_before = newest_attempt(job.run)
    is_own_ray = not ray.is_initialized()
    if is_own_ray:
        note("starting Ray")
    with ray_at_hand(allocation.num_cpus):
        note(f"starting {allocation.describe()}")
        failure = _fit(_make_trainer(job, allocation, is_own_ray), poll)
    # Not an ending that an earlier attempt has left there.
    ending = find_ending(job.run, after_attempt=attempts_before)
    if ending is None:
        cause = first_cause(failure or RuntimeError("the workers left no word of their end"))
        raise explain_training(cause, job.run)
    return ending


def _make_trainer(job: TrainJob, allocation: Allocation, is_own_ray: bool) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = trainer_without_cleaner() if is_own_ray else TorchTrainer
    backend = "cpu:gloo,cuda:nccl" if allocation.use_gpu else "gloo"
    return trainer(
        _train_on_worker,
        train_loop_config={"job": replace(job, config=_for_every_node(job.config, job.run))},
        scaling_config=ScalingConfig(
            num_workers=allocation.num_workers,
            use_gpu=allocation.use_gpu,
            resources_per_worker=allocation.resources_per_worker,
        ),
        run_config=RunConfig(
            name=job.run.path.name,
            storage_path=str(job.run.path.parent),
            failure_config=FailureConfig(max_failures=job.config.max_failures),
        ),
        torch_config=TorchConfig(backend=backend, timeout_s=int(GROUP_TIMEOUT.total_seconds())),
    )


def _for_every_node(config: TrainConfig, run: RunDir) -> TrainConfig:
    """Return the settings such that every worker loads the same model, by absolute path or commit, and tokenizer."""
    if config.chat_template is not None:
        config = config.model_copy(update={"chat_template": read_if_file(config.chat_template)})
    if (folder := config.model.folder) is not None:
        # Ray starts workers in another folder.
        return config.model_copy(update={"model_path": folder.absolute()})
    commit = run.read_params()["model"]["fingerprint"]
    return config.model_copy(update={"model_revision": commit}) if _COMMIT.fullmatch(commit) else config


def _fit(trainer: Any, poll: Callable[[], None]) -> BaseException | None:
    """Run the trainer to its end; return what it raised."""
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread, which explains it
            raised.append(error)

    # Not in the main thread: there `fit` would take SIGINT for itself and abort without a checkpoint.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        poll()
        thread.join(_POLL_S)
    poll()
    return raised[0] if raised else None


class RayWorker:
    """A worker of a Ray Train group."""

    def __init__(self, run: RunDir) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._run = run

    def report(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        import ray.train

        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(checkpoint) if checkpoint else None,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def resume_from(self) -> Path | None:
        latest = self._run.latest_checkpoint()
        return latest.path if latest else None


def _train_on_worker(loop_config: dict[str, Any]) -> None:
    job: TrainJob = loop_config["job"]
    for path in (job.run.params_path, job.prepared_path):
        if not path.exists():
            raise ConfigError(
                f"a worker on {socket.gethostname()} can't see `{path}`",
                "give a --home (and --data_dir) on a disk that every node of the cluster mounts at the same path",
            )
    worker = RayWorker(job.run)
    with log_to_file(job.run.log_path(), rank=worker.rank):
        from tunesmith.train.loop import train
        from tunesmith.train.shortage import shortage_noted

        try:
            with shortage_noted(job.run, worker.rank):
                train(job, worker)
        except BaseException:
            logger.exception("rank %d failed", worker.rank)
            raise
