"""Training under Ray Train: the only import of ray.train."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cluster.local_ray import STOP_SIGNALS, ray_at_hand, signal_handlers_kept
from tunesmith.cluster.remote import find_failed_import
from tunesmith.cluster.resources import Allocation, allocate, connected_nodes, is_elastic
from tunesmith.config import TrainConfig
from tunesmith.data.prepare import prepare
from tunesmith.data.split import check_source
from tunesmith.errors import (
    MISSING_PACKAGE_HINT,
    ConfigError,
    RunError,
    TrainingError,
    TunesmithError,
)
from tunesmith.logs import log_to_file
from tunesmith.model.load import check_weights, load_tokenizer
from tunesmith.runs.folder import RunDir
from tunesmith.runs.identity import is_finished, locate_run
from tunesmith.runs.lease import Lease, refuse_if_held
from tunesmith.runs.metrics_log import find_ending, iterate_metrics, newest_attempt
from tunesmith.tracking.trackers import check_trackers
from tunesmith.train.start import check_model, check_resumable, record_params
from tunesmith.train.worker import TrainJob
from tunesmith.view.figures import draw_loss_curve
from tunesmith.view.watch import LiveView

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_GROUP_TIMEOUT_S = 3600
_START_TIMEOUT_S = 600
# A node of the cloud's has to come up, and to load the image.
_ELASTIC_START_TIMEOUT_S = 1800
_SAME_REQUEST_S = 0.5
_COMMIT = re.compile("[0-9a-f]{40}")
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
# Smallest change of the result first.
_SMALLER = (
    "set --gradient_checkpointing true; "
    "or halve --per_device_train_batch_size and double --gradient_accumulation_steps, which keeps the global batch; "
    "or lower --max_seq_length, or take more workers"
)


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
    run.check_writable()
    refuse_if_held(run.lease_path)
    check_trackers(config)
    check_resumable(run, config)
    check_source(config)
    check_weights(config.model)
    tokenizer = load_tokenizer(config.model)
    check_model(config)
    with connected_nodes() as (nodes, place):
        allocation = allocate(config, nodes, place)
        prepared = prepare(config, tokenizer, run.datasets_path)
        with Lease(run.lease_path) as lease, log_to_file(run.log_path()):
            logger.info("the run's home is `%s`; `tunesmith watch` shows it from anywhere", run.home)
            run.clean()
            if is_finished(run, config):  # and then lost before its result was put in place
                return _conclude(run, config, find_ending(run), None)
            if allocation.num_awaited:
                logger.info(
                    "%d of the %d workers wait for nodes that the autoscaler is to add",
                    allocation.num_awaited,
                    allocation.num_workers,
                )
            record_params(run, config, prepared, allocation.num_workers)
            worker_config = _for_every_node(config, run)
            job = TrainJob(worker_config, run, prepared.folder, allocation.num_threads, lease.token)
            ending, signal_number = _train_on_ray(job, allocation, lease)
            return _conclude(run, config, ending, signal_number)


def _train_on_ray(
    job: TrainJob, allocation: Allocation, lease: Lease
) -> tuple[dict[str, Any] | None, int | None]:
    """Run the job to its end; return the event that ended it, and the signal that asked for it, if one did.

    Raises:
        TunesmithError: it broke off.
    """
    import ray
    from rich.console import Console

    # Ray's own list of checkpoints: it refuses to start when one of them was rotated away. Ours is the folder.
    (job.run.path / _RAY_SNAPSHOT).unlink(missing_ok=True)
    # Of an elastic cluster's idle workers, too, some may have gone while the data was prepared.
    timeout_s = _ELASTIC_START_TIMEOUT_S if is_elastic() else _START_TIMEOUT_S
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(timeout_s))
    attempts_before = newest_attempt(job.run)
    view = LiveView(job.run.metrics_path, Console(stderr=True))
    with _stop_on_signals(job.run, view, attempts_before) as received:
        try:
            is_own_ray = not ray.is_initialized()
            if is_own_ray:
                view.note("starting Ray")
            with ray_at_hand(allocation.num_cpus):
                view.note(f"starting {allocation.describe()}")
                failure = _fit(job, allocation, lease, view, is_own_ray)
        finally:
            view.close()
    # Not an ending that an earlier attempt has left there.
    ending = find_ending(job.run, after_attempt=attempts_before)
    if ending is None:
        raise _explain(failure or RuntimeError("the workers left no word of their end"), job.run)
    return ending, received[0] if received else None


def _fit(
    job: TrainJob, allocation: Allocation, lease: Lease, view: LiveView, is_own_ray: bool
) -> BaseException | None:
    """Run Ray Train's `fit` beside the live view; return what it raised."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    backend = "cpu:gloo,cuda:nccl" if allocation.use_gpu else "gloo"
    trainer = _trainer_class(is_own_ray)(
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
    has_ended = False
    while thread.is_alive():
        view.update()
        if view.progress.ending is not None and not has_ended:
            has_ended = True
            view.note("ending the workers")
        if lease.is_lost:
            raise RunError(
                f"another driver has taken over the run `{job.run.run_name}`; this one has stopped",
                f"`tunesmith watch {job.run.path}` follows it",
            )
        thread.join(0.25)
    view.update()
    return raised[0] if raised else None


def _trainer_class(is_own_ray: bool) -> Any:
    from ray.train.torch import TorchTrainer

    class OwnRayTrainer(TorchTrainer):
        """Without the process that gives back the workers' places when the controller dies.

        A Ray of our own ends with its driver anyway. That process asks the dashboard of the cluster last started
        on this machine whether our controller lives: no answer holds up the run's end, a false one ends the run.
        """

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [it for it in callbacks if type(it).__name__ != "PlacementGroupCleanerCallback"]

    return OwnRayTrainer if is_own_ray else TorchTrainer


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

        try:
            train(job, worker)
        except BaseException:
            logger.exception("rank %d failed", worker.rank)
            raise


@contextmanager
def _stop_on_signals(run: RunDir, view: LiveView, attempts_before: int) -> Iterator[list[int]]:
    """Turn the first SIGINT or SIGTERM into a request to stop; the second ends the process's work at once.

    So does the first, as long as nothing is trained that could be lost. Once the training has ended there is
    nothing to stop.
    """
    received: list[int] = []
    first_at = 0.0

    def request_stop(number: int, _: object) -> None:
        nonlocal first_at
        if find_ending(run, attempts_before) is not None:
            return
        # `timeout` and some schedulers signal the process and then its group: that is one request.
        if received and time.monotonic() - first_at < _SAME_REQUEST_S:
            return
        received.append(number)
        first_at = time.monotonic()
        if len(received) > 1 or not _has_trained(run, attempts_before):
            raise KeyboardInterrupt
        run.stop_path.touch()
        view.note("stopping after this step, with a checkpoint; once more to stop at once")

    with signal_handlers_kept():
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, request_stop)
        yield received


def _has_trained(run: RunDir, attempts_before: int) -> bool:
    lines = iterate_metrics(run.metrics_path)
    return any("loss" in line for line in lines if line["attempt"] > attempts_before)


def _conclude(
    run: RunDir, config: TrainConfig, ending: dict[str, Any] | None, signal_number: int | None
) -> FineTuneResult:
    assert ending is not None
    if ending["event"] == "failed":
        latest = run.latest_checkpoint()
        kept = f"`{latest.path.name}` is kept" if latest else "there is no checkpoint yet"
        raise TrainingError(ending["message"], f"{kept}; the log is `{run.log_path()}`")
    with contextlib.suppress(RunError):  # it ended before there was a loss to draw
        draw_loss_curve(run, run.loss_curve_path)
    if ending["event"] == "finished":
        from tunesmith.export.final import write_final

        write_final(run, config.model)
    return FineTuneResult(run, ending["event"], signal_number)


def _explain(failure: BaseException, run: RunDir) -> TunesmithError:
    """Return the first cause of a failed `fit`, which Ray wraps several times."""
    failures = list(getattr(failure, "worker_failures", {}).values()) or [failure]
    cause = min((_root_of(error) for error in failures), key=_remoteness)
    if isinstance(cause, TunesmithError):
        return cause
    failed_import = find_failed_import(cause)
    if failed_import is not None:
        return TrainingError(f"training failed: {failed_import}", MISSING_PACKAGE_HINT)
    latest = run.latest_checkpoint()
    hint = f"the same command goes on from step {latest.step}" if latest else "no checkpoint was written yet"
    if _ran_out_of_memory(cause):
        hint = f"{_SMALLER}; {hint}"
    return TrainingError(
        f"training failed: {type(cause).__name__}: {cause}", f"{hint}; the log is `{run.log_path()}`"
    )


def _ran_out_of_memory(error: BaseException) -> bool:
    """Return whether torch had none, of a GPU or of the host, or Ray ended a worker for the host's sake."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _root_of(error: BaseException) -> BaseException:
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
    return error


def _remoteness(error: BaseException) -> int:
    """Return how far from the cause an error is: a worker that lost its peer only shows a symptom."""
    if isinstance(error, TunesmithError):
        return 0
    return 2 if any(word in str(error) for word in ("gloo", "NCCL", "Connection")) else 1


def _for_every_node(config: TrainConfig, run: RunDir) -> TrainConfig:
    """Return the settings such that every worker loads the same model: its absolute path, or its commit."""
    if (folder := config.model.folder) is not None:
        # Ray starts workers in another folder.
        return config.model_copy(update={"model_path": folder.absolute()})
    commit = run.read_params()["model"]["fingerprint"]
    return config.model_copy(update={"model_revision": commit}) if _COMMIT.fullmatch(commit) else config
