"""What people call: `fine_tune`, `evaluate` and `convert`. Each checks its input, finds its workers, and runs."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tunesmith.cluster.pool import choose_pool
from tunesmith.cluster.ray_train import train_on_ray
from tunesmith.cluster.resources import Allocation, allocate, connected_nodes
from tunesmith.cluster.task import choose_nodes, includes_this_one, run_on
from tunesmith.config import ConvertConfig, EvaluateConfig, TrainConfig
from tunesmith.data.prepare import keeps_tokens, prepare_run
from tunesmith.data.split import check_sources
from tunesmith.errors import ExportError, RunError, TrainingError
from tunesmith.failures import Work
from tunesmith.logs import log_to_file
from tunesmith.model.adapters.new_tokens import load_run_tokenizer, tell_known_tokens
from tunesmith.model.adapters.prior import with_prior_settings
from tunesmith.model.files.fetched import with_model_here
from tunesmith.model.load import check_weights
from tunesmith.model.vocabulary import check_data_tokens
from tunesmith.remote.copies import copies_in
from tunesmith.runs.folder import RunDir
from tunesmith.runs.identity import is_finished
from tunesmith.runs.lease import Lease, refuse_if_held
from tunesmith.runs.metrics_log import find_ending, newest_attempt
from tunesmith.runs.templates import with_recorded_templates
from tunesmith.runs.tuned import TunedModel, taken
from tunesmith.signals import ended_by_sigterm, stopping_on_signals
from tunesmith.tracking.trackers import check_trackers
from tunesmith.train.same_run import find_run
from tunesmith.train.start import check_model, check_resumable, record_params
from tunesmith.train.worker import TrainJob
from tunesmith.view.figures import draw_loss_curve
from tunesmith.view.watch import LiveView

# What imports torch is imported where it is called: a mistaken path is refused within a second.
if TYPE_CHECKING:
    from tunesmith.evaluate.evaluation import EvaluationResult
    from tunesmith.export.convert import Exported

logger = logging.getLogger(__name__)

_CONVERSION = Work(
    "the conversion",
    failed=ExportError,
    lost=ExportError,
    hint="nothing was put in place; a process that dies has mostly run out of its node's memory",
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
    config = with_recorded_templates(with_prior_settings(config))
    run = find_run(config)
    run.check_writable()
    refuse_if_held(run.lease_path)
    check_trackers(config)
    with copies_in(config.home):
        return _fine_tune(config, run)


def _fine_tune(config: TrainConfig, run: RunDir) -> FineTuneResult:
    check_resumable(run, config)
    if not keeps_tokens(run):
        check_sources(config)
    here = with_model_here(config)
    check_weights(here.model)
    tokenizer = load_run_tokenizer(here)
    tell_known_tokens(here)
    num_known = check_model(here)
    with connected_nodes() as (nodes, place):
        allocation = allocate(config, nodes, place)
        prepared = prepare_run(config, tokenizer, run)
        sets = (prepared.train, prepared.validation)
        check_data_tokens(sets, tokenizer, num_known, str(config.model.source))
        with Lease(run.lease_path) as lease, log_to_file(run.log_path()):
            logger.info("the run's home is `%s`; `tunesmith watch` shows it from anywhere", run.home)
            run.clean()
            if is_finished(run, config):  # and then lost before its result was put in place
                return _conclude(run, here, find_ending(run), None)
            record_params(run, config, prepared, allocation.num_workers)
            job = TrainJob(here, run, prepared.folder, allocation.num_threads, lease.token)
            ending, signal_number = _train(job, allocation, lease)
            return _conclude(run, here, ending, signal_number)


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Evaluate a tuned model beside its base model, as `config` says; finished samples are kept if it is cut short.

    Runs on the GPUs of the Ray cluster of `RAY_ADDRESS`, else on this machine.

    Raises:
        ConfigError, DataError, ModelError, ResourceError, RunError: bad input, before anything is generated.
        EvaluationError: the replicas keep failing.
    """
    from tunesmith.evaluate.evaluation import run_evaluation

    with (
        ended_by_sigterm(),
        taken(config, "test_checkpoint") as tuned,
        connected_nodes() as (nodes, place),
    ):
        pool = choose_pool(config, nodes, place)
        return run_evaluation(config, tuned, pool)


def convert(config: ConvertConfig) -> Exported:
    """Export the tuned model that the settings mean; see `export.convert.export`. With `push_to_hub` it goes to the hub.

    On the Ray cluster of `RAY_ADDRESS`, if that is set, it runs on a node with GPUs, or without any GPU in the
    cluster on one with CPUs; see `cluster.task.choose_nodes`.

    Raises:
        ConfigError, ModelError, ResourceError, RunError: bad input, before anything is written.
        CheckpointError: the checkpoint can't be read.
        ExportError: it can't be written or isn't equal, the process on the cluster is lost, or it couldn't be pushed.
    """
    from tunesmith.export.convert import choose_output, find_finished
    from tunesmith.export.hub import find_target, push

    with taken(config, "convert_checkpoint_to_hf") as tuned:
        target = find_target(config)
        if target is None:
            return _convert(tuned, config, choose_output(tuned, config))
        config = config.model_copy(update={"push_to_hub": target.name})
        output = choose_output(tuned, config)
        exported = find_finished(tuned, config, output) or _convert(tuned, config, output)
        return replace(exported, pushed=push(output, tuned, target, config))


def _convert(tuned: TunedModel, config: ConvertConfig, output: Path) -> Exported:
    from tunesmith.export.convert import export, export_elsewhere
    from tunesmith.export.folder import mark_beside, tidy

    with connected_nodes() as (nodes, _):
        fitting = choose_nodes(nodes)
        if includes_this_one(fitting):
            return export(tuned, config, output)
        with ended_by_sigterm(), mark_beside(output) as mark:
            try:
                return run_on(fitting, _CONVERSION, export_elsewhere, tuned, config, output, mark)
            except (KeyboardInterrupt, ExportError):
                tidy(output)
                raise


def _train(job: TrainJob, allocation: Allocation, lease: Lease) -> tuple[dict[str, Any], int | None]:
    """Train beside a live view; return the event that ended it, and the signal that asked for it, if one did."""
    if allocation.num_awaited:
        logger.info(
            "%d of the %d workers wait for nodes that the autoscaler is to add",
            allocation.num_awaited,
            allocation.num_workers,
        )
    attempts_before = newest_attempt(job.run)
    view = LiveView(job.run.metrics_path, Console(stderr=True))
    with stopping_on_signals(job.run, attempts_before, view.note) as received, closing(view):
        ending = train_on_ray(job, allocation, view.note, _make_poll(view, job.run, lease))
    return ending, received[0] if received else None


def _make_poll(view: LiveView, run: RunDir, lease: Lease) -> Callable[[], None]:
    """Return what is called again and again while a training runs: it draws the view and minds the lease.

    Raises (when called):
        RunError: another driver has taken the run over.
    """
    has_ended = False

    def poll() -> None:
        nonlocal has_ended
        view.update()
        if view.progress.ending is not None and not has_ended:
            has_ended = True
            view.note("ending the workers")
        if lease.is_lost:
            raise RunError(
                f"another driver has taken over the run `{run.run_name}`; this one has stopped",
                f"`tunesmith watch {run.path}` follows it",
            )

    return poll


def _conclude(
    run: RunDir, config: TrainConfig, ending: dict[str, Any] | None, signal_number: int | None
) -> FineTuneResult:
    """Draw the loss curve and put the result in place, or raise the failure that was recorded."""
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
