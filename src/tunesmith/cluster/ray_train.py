"""Training under Ray Train: the only import of ray.train."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cluster.resources import Allocation, allocate, connected_nodes
from tunesmith.config import TrainConfig
from tunesmith.data.prepare import prepare
from tunesmith.data.split import check_source
from tunesmith.errors import ConfigError, RunError, TrainingError, TunesmithError
from tunesmith.lease import Lease
from tunesmith.logs import log_to_file
from tunesmith.model.load import load_tokenizer
from tunesmith.runs import RunDir
from tunesmith.train.start import (
    check_model,
    check_resumable,
    check_writable,
    ending_of,
    last_event,
    locate_run,
    record_params,
)
from tunesmith.train.tracking import check_wandb
from tunesmith.train.worker import TrainJob
from tunesmith.view.figures import draw_loss_curve
from tunesmith.view.watch import LiveView

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_GROUP_TIMEOUT_S = 3600
_COMMIT = re.compile("[0-9a-f]{40}")
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class FineTuneResult:
    """How a training ended: `finished` or, on a signal, `stopped`."""

    run: RunDir
    ending: str
    signal_number: int | None = None

    @property
    def exit_code(self) -> int:
        """The process's: 0 when finished, else that of the signal, as shells have it."""
        return 0 if self.ending == "finished" else 128 + (self.signal_number or signal.SIGTERM)


def fine_tune(config: TrainConfig) -> FineTuneResult:
    """Train as `config` says, going on from the run's last checkpoint if it has one.

    Runs on the Ray cluster of `RAY_ADDRESS`, else on a Ray of its own on this machine. SIGINT and SIGTERM
    end it after the current step, with a checkpoint; a second one ends it at once.

    Raises:
        ConfigError, DataError, ModelError, ResourceError, RunError: bad input, before anything is written.
        TrainingError: the training itself failed.
    """
    run = locate_run(config)
    check_writable(run)
    check_wandb(config)
    check_resumable(run, config)
    check_source(config)
    tokenizer = load_tokenizer(config)
    model_config = check_model(config)
    with connected_nodes() as (nodes, place):
        allocation = allocate(config, nodes, place)
        prepared = prepare(config, tokenizer, run.datasets_path)
        with Lease(run.lease_path) as lease, log_to_file(run.log_path()):
            run.clean()
            record_params(run, config, model_config, prepared, allocation.num_workers)
            job = TrainJob(
                _for_every_node(config, run), run, prepared.folder, allocation.num_threads, lease.token
            )
            signal_number = _train_on_ray(job, allocation)
            return _conclude(job, allocation, signal_number)


def _train_on_ray(job: TrainJob, allocation: Allocation) -> int | None:
    """Run the job to its end; return the signal that ended it early, if one did."""
    import ray
    from rich.console import Console

    # Ray's own list of checkpoints: it refuses to start when one of them was rotated away. Ours is the folder.
    (job.run.path / _RAY_SNAPSHOT).unlink(missing_ok=True)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    view = LiveView(job.run.metrics_path, Console(stderr=True))
    starts_ray = not ray.is_initialized()
    try:
        if starts_ray:
            view.note("starting Ray")
            logging.getLogger("ray").setLevel(logging.ERROR)
            # "local": else Ray would join whatever cluster was last started on this machine, dead or alive.
            ray.init("local", log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        view.note(f"starting {allocation.describe()}")
        with _stop_on_signals(job.run, view) as received:
            failure = _fit(job, allocation, view)
    finally:
        view.close()
        if starts_ray:
            ray.shutdown()
    if failure is not None and ending_of(job.run) is None:
        raise _explain(failure, job.run)
    return received[0] if received else None


def _fit(job: TrainJob, allocation: Allocation, view: LiveView) -> BaseException | None:
    """Run Ray Train's `fit` beside the live view; return what it raised."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    backend = "cpu:gloo,cuda:nccl" if allocation.use_gpu else "gloo"
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={"job": job},
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
        torch_config=TorchConfig(backend=backend, timeout_s=_GROUP_TIMEOUT_S),
    )
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
        view.update()
        thread.join(0.25)
    view.update()
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
    if not job.run.params_path.exists():
        raise ConfigError(
            f"a worker on {socket.gethostname()} can't see the run folder `{job.run.path}`",
            "give a --home on a disk that every node of the cluster mounts at the same path",
        )
    worker = RayWorker(job.run)
    with log_to_file(job.run.log_path(), rank=worker.rank):
        from tunesmith.train.loop import train

        try:
            train(job, worker)
        except BaseException:
            logger.exception("rank %d failed", worker.rank)
            raise


@contextmanager
def _stop_on_signals(run: RunDir, view: LiveView) -> Iterator[list[int]]:
    """Turn the first SIGINT or SIGTERM into a request to stop; the second ends the process's work at once."""
    received: list[int] = []

    def request_stop(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        run.stop_path.touch()
        view.note("stopping after this step, with a checkpoint; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _conclude(job: TrainJob, allocation: Allocation, signal_number: int | None) -> FineTuneResult:
    run = job.run
    ending = ending_of(run)
    with contextlib.suppress(RunError):  # it ended before there was a loss to draw
        draw_loss_curve(run, run.loss_curve_path)
    if ending == "failed":
        latest = run.latest_checkpoint()
        kept = f"`{latest.path.name}` is kept" if latest else "there is no checkpoint yet"
        raise TrainingError(last_event(run, "failed")["message"], f"{kept}; the log is `{run.log_path()}`")
    if ending == "finished":
        from tunesmith.train.final import write_final

        write_final(run, job.config, "cuda" if allocation.use_gpu else "cpu")
    return FineTuneResult(run, ending or "stopped", signal_number)


def _explain(failure: BaseException, run: RunDir) -> TunesmithError:
    """Return the first cause of a failed `fit`, which Ray wraps several times."""
    causes = list(getattr(failure, "worker_failures", {}).values()) or [failure]
    cause: BaseException = causes[0]
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    if isinstance(cause, TunesmithError):
        return cause
    latest = run.latest_checkpoint()
    hint = f"the same command goes on from step {latest.step}" if latest else "no checkpoint was written yet"
    return TrainingError(
        f"training failed: {type(cause).__name__}: {cause}", f"{hint}; the log is `{run.log_path()}`"
    )


def _for_every_node(config: TrainConfig, run: RunDir) -> TrainConfig:
    """Return the settings such that every worker loads the same model: its absolute path, or its commit."""
    if config.model_path is not None:
        # Ray starts workers in another folder.
        return config.model_copy(update={"model_path": Path(config.model_source).absolute()})
    commit = run.read_params()["model"]["fingerprint"]
    return config.model_copy(update={"model_revision": commit}) if _COMMIT.fullmatch(commit) else config
