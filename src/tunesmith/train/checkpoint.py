"""Checkpoints: whole or absent, written off the critical path, restored on any number of workers.

checkpoint_00000100/
  state/                  torch.distributed.checkpoint: trained weights and optimizer, sharded
  trainer_state.json      step, validation loss, early stopping
  params.json             the run's resolved settings
  adapter_config.json  adapter_model.safetensors      LoRA: what PEFT and vLLM load
  tokenizer.json …        the base model's files as they are, with the run's chat template
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from tunesmith.atomic_files import remove_folder, sync_files, write_json
from tunesmith.errors import CheckpointError
from tunesmith.model.adapters.lora import is_kept, write_adapter
from tunesmith.model.adapters.prior import find_adapter
from tunesmith.model.files.state import STATE_FOLDER, read_weights
from tunesmith.model.files.tokenizer_files import pack_tokenizer, unpack_tokenizer
from tunesmith.parallel.collectives import broadcast_objects
from tunesmith.parallel.timeouts import GROUP_TIMEOUT
from tunesmith.runs.folder import FORMAT_VERSION, STATE_FILE, Checkpoint, read_versioned_json
from tunesmith.runs.lease import holds
from tunesmith.train.stopping import EarlyStopping
from tunesmith.train.worker import TrainJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the little that isn't a tensor."""

    step: int = 0
    eval_loss: float | None = None
    """Validation loss at this very step, in nats; None where it wasn't measured."""
    stopping: EarlyStopping = field(default_factory=EarlyStopping)

    def observe(self, eval_loss: float, threshold: float) -> Progress:
        """Return the progress after an evaluation at this step."""
        return replace(self, eval_loss=eval_loss, stopping=self.stopping.observe(eval_loss, threshold))

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Progress:
        return Progress(content["step"], content["eval_loss"], EarlyStopping(**content["stopping"]))


class Checkpointer:
    """Saves and restores one run's model and optimizer. Made by every rank, together."""

    def __init__(
        self,
        job: TrainJob,
        rank: int,
        model: nn.Module,
        optimizer: Optimizer,
        tokenizer: PreTrainedTokenizerFast,
        stager: DefaultStager | None = None,
    ) -> None:
        """`stager` copies the state into memory that it keeps until the end; without one, each save takes its own."""
        self._job = job
        self._rank = rank
        self._model = model
        self._optimizer = optimizer
        self._stager = stager
        self._tokenizer_files = pack_tokenizer(tokenizer, job.config.model) if rank == 0 else {}
        # Its own group: the background write must not mix its messages with the loop's.
        self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        (self._token,) = broadcast_objects([uuid.uuid4().hex[:8]], self._group)
        if rank == 0:
            job.run.discard_unfinished()  # of a group that a failure has ended
        self._writing: Future[Any] | None = None
        self._outcome: Future[Checkpoint] | None = None
        self._folder: Path | None = None

    def restore(self, folder: Path) -> Progress:
        """Load the checkpoint in `folder`, saved by any number of workers. Collective.

        Raises:
            CheckpointError: it can't be read.
        """
        progress = Progress.from_json(read_versioned_json(folder / STATE_FILE))
        try:
            # Reads each rank's slices into the very tensors that model and optimizer hold.
            dcp.load(self._tensors(), checkpoint_id=folder / STATE_FOLDER, process_group=self._group)
        except (OSError, ValueError, RuntimeError, dcp.api.CheckpointException) as error:
            raise CheckpointError(
                f"can't read the checkpoint `{folder}`: {_cause(error)}",
                "remove that folder to go on from the one before it",
            ) from error
        return progress

    def save(self, progress: Progress) -> None:
        """Copy the state and start to write it in the background. Collective.

        Waits for the write before it, if that is still going on.
        """
        self.wait()
        folder = self._job.run.unfinished_path(progress.step, self._token)
        writing = self._writing = self._start_writing(folder / STATE_FOLDER)
        if self._rank == 0:
            self._folder = folder
            self._outcome = _then(writing, lambda: self._publish(folder, progress))

    def _start_writing(self, folder: Path) -> Future[Any]:
        start = partial(dcp.async_save, self._tensors(), checkpoint_id=folder, process_group=self._group)
        try:
            writing = start(async_stager=self._stager)
        except (RuntimeError, AssertionError) as error:
            # Nothing has been said to other ranks yet.
            if self._stager is None:
                raise
            logger.warning("memory for saves can't be kept: %s", _cause(error))
            self._stager = None
            writing = start()
        assert isinstance(writing, Future)
        return writing

    def wait(self) -> None:
        """Block until this rank's share of the last save is written (rank 0: published) or has failed."""
        for future in (self._writing, self._outcome):
            if future is not None:
                future.exception()
        self._writing = None

    def close(self) -> None:
        """Give back the process group and the memory of saves; the last one must have been waited for."""
        if self._stager is not None:
            self._stager.close()
        dist.destroy_process_group(self._group)

    def take_outcome(self) -> Checkpoint | CheckpointError | None:
        """Return, once, what became of the last save: the checkpoint, an error, or None while it goes on.

        Rank 0 knows; other ranks always get None.
        """
        outcome = self._outcome
        if outcome is None or not outcome.done():
            return None
        self._outcome = None
        error = outcome.exception()
        if error is None:
            return outcome.result()
        if self._folder is not None:
            # On a full disk the unfinished files would keep it full.
            shutil.rmtree(self._folder, ignore_errors=True)
        return CheckpointError(
            f"a checkpoint could not be written: {_cause(error)}", "the one before it is kept"
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return what is kept of the model, and its optimizer state, by name: `model.{name}`, `optimizer.{name}.{key}`."""
        if isinstance(self._model, FSDPModule):
            self._model.reshard()  # an evaluation leaves the outermost weights gathered
        tensors = {}
        for name, parameter in self._model.named_parameters():
            if is_kept(name, parameter):
                tensors[f"model.{name}"] = parameter.detach()
            if parameter.requires_grad:
                for key, value in self._optimizer.state[parameter].items():
                    tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def _publish(self, folder: Path, progress: Progress) -> Checkpoint:
        run, config = self._job.run, self._job.config
        if not config.full_ft:
            beneath = (
                find_adapter(config.adapter_path) if config.adapter_path and config.merge_adapter else None
            )
            write_adapter(self._model, read_weights(folder), folder, beneath)
        unpack_tokenizer(self._tokenizer_files, folder)
        shutil.copyfile(run.params_path, folder / run.params_path.name)
        write_json(folder / STATE_FILE, progress.to_json())
        sync_files(folder)
        token = self._job.lease_token
        if token is not None and not holds(run.lease_path, token):
            raise CheckpointError("another driver has taken over this run")
        published = run.checkpoint_path(progress.step)
        if published.exists():
            remove_folder(published)
        folder.rename(published)
        run.discard_checkpoints(config.save_total_limit)
        return Checkpoint(published, progress.step, progress.eval_loss)


def build_stager(device_type: str) -> DefaultStager | None:
    """Return what GPUs copy a save's state with: into pinned memory, which is taken once. CPUs have none to spare."""
    if device_type != "cuda" or not keeps_staging(torch.__version__):
        return None
    options = StagingOptions(
        use_pinned_memory=True, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=True
    )
    return DefaultStager(options)


def keeps_staging(torch_version: str) -> bool:
    """Return whether a stager of this torch can be used again: torch 2.11 clears its own after each save."""
    return tuple(int(part) for part in torch_version.split(".")[:2]) >= (2, 13)


def _then(first: Future[Any], work: Callable[[], Checkpoint]) -> Future[Checkpoint]:
    """Return a future of `work`, run in the thread that ends `first`, or of the error of `first`."""
    outcome: Future[Checkpoint] = Future()

    def finish(done: Future[Any]) -> None:
        try:
            done.result()
            outcome.set_result(work())
        except BaseException as error:  # handed on whole: whoever takes the outcome sees it
            outcome.set_exception(error)

    first.add_done_callback(finish)
    return outcome


def _cause(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException):
        return "; ".join(f"rank {rank}: {_cause(failure[0])}" for rank, failure in error.failures.items())
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
