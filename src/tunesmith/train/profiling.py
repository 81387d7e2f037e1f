"""Where the time of some steps goes: torch's own profiler, as a trace and a table in the run folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from tunesmith.atomic_files import write_text
from tunesmith.train.worker import TrainJob, Worker

logger = logging.getLogger(__name__)

# They compile, fill the allocator's pool, and let the profiler start.
_WARM_UP_STEPS = 2
_LISTED_OPERATIONS = 60


class StepProfiler:
    """Records the steps `recorded` of an attempt, once each step is announced; none where there are none."""

    def __init__(self, folder: Path, recorded: range, first_step: int, device: torch.device) -> None:
        self._folder = folder
        self._recorded = recorded
        self._num_warm_up = min(1, recorded.start - first_step)
        self._device = device
        self._profiler: profile | None = None
        self._step = 0

    def announce(self, step: int) -> None:
        """Tell that `step` is about to be taken."""
        if not self._recorded or step < self._recorded.start - self._num_warm_up:
            return
        if step == self._recorded.stop:
            self.close()
        elif self._profiler is not None:
            self._profiler.step()
        elif step < self._recorded.stop:
            self._profiler = self._start()
        self._step = step

    def close(self) -> None:
        """Write what has been recorded so far; a second call does nothing."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        if self._step < self._recorded.start:
            logger.warning("the attempt ended before a step could be profiled")
            return
        try:
            trace, table = self._write(profiler)
        except OSError as error:
            logger.warning("the profile can't be written to `%s`: %s", self._folder, error)
        else:
            logger.info(
                "profile of steps %d to %d: `%s`, `%s`", self._recorded.start, self._step, trace, table
            )

    def _start(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        cycle = schedule(wait=0, warmup=self._num_warm_up, active=len(self._recorded), repeat=1)
        profiler = profile(activities=activities, schedule=cycle, acc_events=True)
        profiler.start()
        return profiler

    def _write(self, profiler: profile) -> Sequence[Path]:
        name = f"steps_{self._recorded.start:08d}-{self._step:08d}"
        trace, table = (self._folder / f"{name}.{ending}" for ending in ("trace.json.gz", "txt"))
        self._folder.mkdir(exist_ok=True)
        unfinished = self._folder / f".{trace.name}"
        profiler.export_chrome_trace(str(unfinished))
        unfinished.replace(trace)
        longest = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        averages = profiler.key_averages()
        write_text(table, [averages.table(sort_by=longest, row_limit=_LISTED_OPERATIONS), "\n"])
        return trace, table


def open_profiler(job: TrainJob, worker: Worker, start_step: int, num_steps: int) -> StepProfiler:
    """Return what records steps of an attempt that goes on from `start_step`: on rank 0, if the settings ask for it."""
    count = job.config.profile if worker.rank == 0 else 0
    recorded = choose_steps(start_step, num_steps, count)
    return StepProfiler(job.run.profile_path, recorded, start_step + 1, worker.device)


def choose_steps(start_step: int, num_steps: int, count: int) -> range:
    """Return the `count` steps after an attempt's first ones; near the run's end, those that are left."""
    last = min(start_step + _WARM_UP_STEPS + count, num_steps)
    return range(max(start_step, last - count) + 1, last + 1)
