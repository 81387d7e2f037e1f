"""How a run is shown: live panel, plain lines, summary, loss curve."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tunesmith.errors import RunError
from tunesmith.runs.folder import RunDir
from tunesmith.tracking.jsonl import MetricsLog
from tunesmith.view.curves import draw_bars, smooth
from tunesmith.view.figures import draw_loss_curve
from tunesmith.view.panel import RunPanel
from tunesmith.view.progress import RunProgress
from tunesmith.view.summary import format_summary
from tunesmith.view.units import format_bytes, format_duration
from tunesmith.view.watch import LiveView, watch

MAX_STEPS = 100


def loss_at(step: int) -> float:
    return 2.0 + 2.0 * math.exp(-step / 20)


def training_values(step: int, max_steps: int = MAX_STEPS) -> dict[str, float]:
    return {
        "epoch": step / 50,
        "loss": loss_at(step),
        "learning_rate": 5e-5,
        "grad_norm": 0.75,
        "tokens": 1024,
        "trained_tokens": 512,
        "tokens_per_second": 1234.0,
        "step_time_s": 0.83,
        "data_wait_s": 0.0083,
        "peak_memory_bytes": 3 * 2**30,
        "max_steps": max_steps,
    }


def run_dir_in(home: Path) -> RunDir:
    return RunDir(home, "results", "tiny", "a-run")


def record(run_dir: RunDir, attempt: int, first: int, last: int, ending: str | None = None) -> None:
    """Record an attempt that goes on from step `first` (0: afresh) and ends after step `last`."""
    log = MetricsLog(run_dir.metrics_path, attempt, {})
    log.event(first, "start", f"from checkpoint_{first:08d}" if first else "fresh start")
    if first == 0:
        log.evaluation(0, {"eval_loss": 4.0})
    for step in range(first + 1, last + 1):
        log.training(step, training_values(step))
        if step % 20 == 0:
            log.evaluation(step, {"eval_loss": loss_at(step) + (0.5 if step == 100 else 0.0)})
            log.event(step, "checkpoint", f"checkpoint_{step:08d}")
    if ending == "finished":
        log.event(last, "finished", "all steps are done")
    elif ending == "failed":
        log.event(last, "failed", "loss is not finite")
    log.close()


def console_of(width: int, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, _environ={"TERM": "xterm"})


def written_to(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def panel_of(run_dir: RunDir, width: int = 80, later_s: float = 0.0) -> str:
    progress = RunProgress(run_dir.metrics_path)
    progress.poll()
    console = console_of(width)
    console.print(RunPanel(progress, now=time.time() + later_s))
    return written_to(console)


def shift_times(path: Path, seconds_per_step: float) -> None:
    """Give every line the time it would have at this pace, the last one being now."""
    header, *lines = [json.loads(text) for text in path.read_text().splitlines()]
    for line in lines:
        line["time"] = time.time() - (lines[-1]["step"] - line["step"]) * seconds_per_step
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))


@pytest.mark.parametrize("width", [60, 120])
def test_the_panel_shows_everything_and_keeps_to_the_width(tmp_path: Path, width: int) -> None:
    run_dir = run_dir_in(tmp_path)
    record(run_dir, 1, 0, 60)
    shift_times(run_dir.metrics_path, seconds_per_step=2.0)
    shown = panel_of(run_dir, width)
    assert {len(line) for line in shown.splitlines()} == {width}
    for words in (
        "a-run",
        "60 of 100  (60%)",
        "ETA 1 min 2",
        "2 min 00 s elapsed",
        "epoch 1.20",
        f"{loss_at(60):.4f}",
        f"{loss_at(60):.4f} at step 60, the best",
        "1,234 tokens/s",
        "0.83 s per step",
        "data wait 1%",
        "peak memory 3.00 GiB",
        "learning rate 5.00e-05",
        "grad norm 0.75",
        "checkpoint_00000060",
        "running",
    ):
        assert words in shown, words
    assert "MFU" not in shown
    assert "attempt" not in shown
    chart = re.findall(r"[▁▂▃▄▅▆▇█]+", shown)
    assert chart[0][0] == "█"
    assert len(chart) >= 3


def test_the_best_evaluation_is_named_when_it_is_not_the_last(tmp_path: Path) -> None:
    record(run_dir_in(tmp_path), 1, 0, 100, "finished")
    shown = panel_of(run_dir_in(tmp_path))
    assert f"{loss_at(100) + 0.5:.4f} at step 100  best {loss_at(80):.4f} at step 80" in shown
    assert "finished at step 100: all steps are done" in shown
    assert "ETA" not in shown
    assert "no news" not in shown


def test_a_resumed_attempt_is_shown_from_its_own_step(tmp_path: Path) -> None:
    run_dir = run_dir_in(tmp_path)
    record(run_dir, 1, 0, 95, "failed")
    record(run_dir, 2, 40, 50)
    progress = RunProgress(run_dir.metrics_path)
    progress.poll()
    assert [point.step for point in progress.training] == list(range(1, 51))
    assert [point.attempt for point in progress.training] == [1] * 40 + [2] * 10
    assert [point.step for point in progress.evaluations] == [0, 20, 40]
    assert (progress.step, progress.attempt, progress.ending) == (50, 2, None)
    assert "2, from step 40" in panel_of(run_dir)


def test_a_checkpoint_reported_late_does_not_move_the_run_back(tmp_path: Path) -> None:
    log = MetricsLog(run_dir_in(tmp_path).metrics_path, 1, {})
    log.training(43, training_values(43))
    log.event(40, "checkpoint", "")
    progress = RunProgress(run_dir_in(tmp_path).metrics_path)
    progress.poll()
    assert progress.step == 43
    assert len(progress.training) == 1
    log.event(43, "finished", "")
    log.event(43, "checkpoint", "")
    log.close()
    progress.poll()
    assert progress.ending is not None
    assert progress.ending.event == "finished"


def test_a_silent_run_is_called_silent_and_a_quick_one_is_not(tmp_path: Path) -> None:
    record(run_dir_in(tmp_path), 1, 0, 30)
    assert "running" in panel_of(run_dir_in(tmp_path), later_s=20)
    assert "no news for 5 min" in panel_of(run_dir_in(tmp_path), later_s=300)
    shift_times(run_dir_in(tmp_path).metrics_path, seconds_per_step=100)
    assert "running" in panel_of(run_dir_in(tmp_path), later_s=300)


def test_lines_are_taken_once_and_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    progress = RunProgress(path)
    assert progress.poll() == []
    lines = [{"format_version": 1}, *({"step": step, "attempt": 1, "loss": 1.0} for step in range(1, 4))]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    seen = []
    for end in range(1, len(content) + 1):
        path.write_bytes(content[:end])
        seen += [point.step for point in progress.poll()]
    assert seen == [1, 2, 3]


def test_a_torn_line_between_attempts_is_left_out(tmp_path: Path) -> None:
    run_dir = run_dir_in(tmp_path)
    record(run_dir, 1, 0, 10)
    os.truncate(run_dir.metrics_path, run_dir.metrics_path.stat().st_size - 25)
    record(run_dir, 2, 5, 12)
    progress = RunProgress(run_dir.metrics_path)
    progress.poll()
    assert [point.step for point in progress.training] == list(range(1, 13))


def test_a_run_deleted_and_begun_anew_is_followed_from_its_start(tmp_path: Path) -> None:
    run_dir = run_dir_in(tmp_path)
    record(run_dir, 1, 0, 50)
    progress = RunProgress(run_dir.metrics_path)
    progress.poll()
    run_dir.metrics_path.unlink()
    assert progress.poll() == []
    record(run_dir, 1, 0, 3)
    progress.poll()
    assert [point.step for point in progress.training] == [1, 2, 3]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"format_version": 99}\n')
    with pytest.raises(RunError, match="99"):
        RunProgress(tmp_path / "metrics.jsonl").poll()


def test_losses_that_are_not_finite_are_shown_and_drawn(tmp_path: Path) -> None:
    run_dir = run_dir_in(tmp_path)
    log = MetricsLog(run_dir.metrics_path, 1, {})
    for step in range(1, 60):
        log.training(step, {**training_values(step), "loss": math.nan if step > 50 else loss_at(step)})
    log.evaluation(59, {"eval_loss": math.nan})
    log.event(59, "failed", "loss is nan")
    log.close()
    shown = panel_of(run_dir, 60)
    assert "nan" in shown
    assert "failed at step 59" in shown
    draw_loss_curve(run_dir, tmp_path / "curve.png")
    console_of(60).print(format_summary(run_dir))


def test_ten_thousand_lines_are_followed_without_reading_them_again(tmp_path: Path) -> None:
    run_dir = run_dir_in(tmp_path)
    log = MetricsLog(run_dir.metrics_path, 1, {})
    for step in range(1, 10_001):
        log.training(step, training_values(step, 20_000))
    view = LiveView(run_dir.metrics_path, console_of(100, terminal=True), new_attempt=False)
    view.update()
    assert len(view.progress.training) == 10_000
    started = time.perf_counter()
    for step in range(10_001, 10_011):
        log.training(step, training_values(step, 20_000))
        view.update()
    each_s = (time.perf_counter() - started) / 10
    log.close()
    view.close()
    assert view.progress.step == 10_010
    # A quarter of a second is between two drawings; reading all lines again would take most of it.
    assert each_s < 0.15


def test_the_embedded_view_waits_for_the_new_attempt(tmp_path: Path) -> None:
    run_dir = run_dir_in(tmp_path)
    record(run_dir, 1, 0, 20, "failed")
    console = console_of(80)
    view = LiveView(run_dir.metrics_path, console)
    view.note("loading the model")
    view.update()
    assert written_to(console) == "starting workers…\nloading the model\n"
    record(run_dir, 2, 20, 21)
    view.update()
    view.close()
    lines = written_to(console).splitlines()[2:]
    assert lines[0] == "attempt 2 at step 20: from checkpoint_00000020"
    assert lines[1].startswith(f"step 21/100 (21%)  loss {loss_at(21):.4f}  lr 5.00e-05  1,234 tokens/s")
    assert len(lines) == 2


def test_plain_lines_thin_out_steps_but_neither_evaluations_nor_the_end(tmp_path: Path) -> None:
    console = console_of(60)
    run_dir = run_dir_in(tmp_path)
    view = LiveView(run_dir.metrics_path, console)
    record(run_dir, 1, 0, 100, "finished")
    view.update()
    view.close()
    shown = written_to(console)
    assert re.findall(r"^step (\d+)/", shown, re.M) == ["1", "100"]
    assert re.findall(r"^eval loss [\d.]+ at step (\d+)", shown, re.M) == ["0", "20", "40", "60", "80", "100"]
    assert f"eval loss {loss_at(80):.4f} at step 80 (best)" in shown
    assert shown.splitlines()[-1] == "finished at step 100: all steps are done"
    assert "\x1b" not in shown


def test_plain_lines_show_every_step_when_steps_are_rare(tmp_path: Path) -> None:
    console = console_of(60)
    view = LiveView(run_dir_in(tmp_path).metrics_path, console, plain_interval_s=0.0)
    record(run_dir_in(tmp_path), 1, 0, 5)
    view.close()
    assert re.findall(r"^step (\d+)/", written_to(console), re.M) == ["1", "2", "3", "4", "5"]


def test_the_view_on_a_terminal_draws_the_note_and_then_the_panel(tmp_path: Path) -> None:
    run_dir = run_dir_in(tmp_path)
    console = console_of(60, terminal=True)
    view = LiveView(run_dir.metrics_path, console)
    view.note("preparing the data")
    view.update()
    time.sleep(0.6)
    assert "preparing the data" in written_to(console)
    assert "step" not in written_to(console)
    record(run_dir, 1, 0, 100, "finished")
    view.update()
    view.close()
    shown = written_to(console)
    assert "100 of 100" in shown
    assert "all steps are done" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor comes back"


def test_a_note_during_the_run_stands_in_the_panel_until_the_end(tmp_path: Path) -> None:
    run_dir = run_dir_in(tmp_path)
    console = console_of(60, terminal=True)
    view = LiveView(run_dir.metrics_path, console)
    view.note("loading the model")
    record(run_dir, 1, 0, 30)
    view.update()
    before = len(written_to(console))
    view.note("stopping after this step")
    view.update()
    drawn = written_to(console)[before:]
    assert "stopping after this step" in drawn
    assert "loading the model" not in drawn
    record(run_dir, 2, 30, 31, "finished")
    before = len(written_to(console))
    view.close()
    last_drawn = written_to(console)[before:].rsplit("a-run", 1)[1]
    assert "all steps are done" in last_drawn
    assert "stopping after this step" not in last_drawn


class SignallingStream(io.StringIO):
    """Is interrupted by a signal in the first write after it is armed."""

    armed = False

    def write(self, text: str) -> int:
        if self.armed:
            self.armed = False
            half = len(text) // 2
            super().write(text[:half])
            signal.raise_signal(signal.SIGUSR1)
            return half + super().write(text[half:])
        return super().write(text)


def test_a_note_from_a_signal_handler_waits_for_the_line_to_end(tmp_path: Path) -> None:
    stream = SignallingStream()
    view = LiveView(run_dir_in(tmp_path).metrics_path, Console(file=stream, width=80))
    record(run_dir_in(tmp_path), 1, 0, 5)
    previous = signal.signal(signal.SIGUSR1, lambda *_: view.note("stopping"))
    try:
        stream.armed = True
        view.update()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    lines = stream.getvalue().splitlines()
    assert lines[1] == "start at step 0: fresh start"
    assert lines[-1] == "stopping"
    view.close()


def test_a_stream_of_ascii_gets_ascii(tmp_path: Path) -> None:
    record(run_dir_in(tmp_path), 1, 0, 20, "finished")
    for once in (True, False):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        watch(run_dir_in(tmp_path).path, once=once, stream=stream)
        stream.flush()
        shown = stream.buffer.getvalue()  # type: ignore[attr-defined]
        assert b"finished at step 20" in shown


def test_watching_a_finished_run_says_how_it_ended_and_returns(tmp_path: Path) -> None:
    record(run_dir_in(tmp_path), 1, 0, 100, "finished")
    stream = io.StringIO()
    watch(tmp_path, stream=stream)
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["waiting", "step", "eval", "finished"]


def test_once_prints_one_snapshot_of_a_live_run(tmp_path: Path) -> None:
    record(run_dir_in(tmp_path), 1, 0, 30)
    stream = io.StringIO()
    watch(str(run_dir_in(tmp_path).path), once=True, stream=stream)
    assert stream.getvalue().count("30 of 100") == 1


def test_once_works_before_the_first_line(tmp_path: Path) -> None:
    run_dir_in(tmp_path).path.mkdir(parents=True)
    stream = io.StringIO()
    watch(tmp_path, once=True, stream=stream)
    assert "no step yet" in stream.getvalue()


def test_watching_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        watch(tmp_path / "nothing")


def start_watching(run_dir: RunDir, output: int) -> subprocess.Popen[bytes]:
    code = "import sys; from tunesmith.view.watch import watch; watch(sys.argv[1])"
    environment = {**os.environ, "TERM": "xterm", "PYTHONUNBUFFERED": "1", "COLUMNS": "80", "LINES": "40"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir.path)],
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
    )


def read_until(source: int, words: bytes, timeout_s: float = 60) -> bytes:
    """Read until `words` have come, or all there is when the other side has ended."""
    content, deadline = b"", time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:  # `select.select` refuses descriptors above 1,023
        selector.register(source, selectors.EVENT_READ)
        while words not in content:
            assert time.monotonic() < deadline, content
            if not selector.select(timeout=1):
                continue
            try:
                part = os.read(source, 65536)
            except OSError:  # how Linux ends a pseudo-terminal
                break
            if not part:
                break
            content += part
    return content


def test_ctrl_c_leaves_the_plain_view_quietly(tmp_path: Path) -> None:
    record(run_dir_in(tmp_path), 1, 0, 30)
    source, output = os.pipe()
    process = start_watching(run_dir_in(tmp_path), output)
    os.close(output)
    shown = read_until(source, b"step 30/100")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    shown += read_until(source, b"\0")
    os.close(source)
    assert b"Traceback" not in shown


def test_a_terminal_follows_a_growing_run_to_its_end(tmp_path: Path) -> None:
    run_dir = run_dir_in(tmp_path)
    record(run_dir, 1, 0, 30)
    source, output = pty.openpty()
    process = start_watching(run_dir, output)
    os.close(output)
    assert b"30 of 100" in read_until(source, b"30 of 100")
    record(run_dir, 2, 20, 100, "finished")
    shown = read_until(source, b"\0")
    os.close(source)
    assert process.wait(timeout=30) == 0
    assert b"100 of 100" in shown
    assert b"all steps are done" in shown
    assert shown.rstrip().endswith(b"\x1b[?25h")
    assert b"Traceback" not in shown


def test_smoothing_keeps_the_start_the_level_and_the_length() -> None:
    steady = smooth([3.0] * 200)
    np.testing.assert_allclose(steady, 3.0)
    noisy = np.random.default_rng(0).normal(2.0, 0.5, 1000)
    assert smooth(noisy).std() < 0.15
    assert abs(smooth(noisy).mean() - 2.0) < 0.05
    steep = [loss_at(step) for step in range(1000)]
    assert smooth(steep)[0] == steep[0]
    assert len(smooth(steep)) == 1000
    with_gap = [1.0] * 100 + [math.nan] + [1.0] * 100
    np.testing.assert_allclose(smooth(with_gap), 1.0)


def test_bars_fit_the_width_and_run_from_high_to_low() -> None:
    assert draw_bars([3.0, 2.0, 1.0], 10) == ["█▄▁"]
    assert draw_bars([1.0, 2.0], 10, height=2) == [" █", "▁█"]
    assert draw_bars([1.0, math.nan, 2.0], 10) == ["▁ █"]
    assert draw_bars([math.nan], 10) == [""]
    assert draw_bars([2.0], 10) == ["▄"]
    falling = draw_bars([float(-value) for value in range(10_000)], 60)[0]
    assert len(falling) == 60
    assert falling[0] == "█"
    assert falling[-1] == "▁"
    assert list(falling) == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (100_000, "1 d 3 h")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_bytes_read_well() -> None:
    assert (format_bytes(300 * 2**20), format_bytes(5.5 * 2**30)) == ("300 MiB", "5.50 GiB")


@pytest.mark.parametrize("num_points", [1, 10, 10_000])
def test_the_loss_curve_is_a_picture_with_both_losses_in_it(tmp_path: Path, num_points: int) -> None:
    from matplotlib.image import imread

    run_dir = run_dir_in(tmp_path)
    log = MetricsLog(run_dir.metrics_path, 1, {})
    for step in range(1, num_points + 1):
        log.training(step, training_values(step, num_points))
    log.evaluation(num_points, {"eval_loss": 2.2})
    log.close()
    path = tmp_path / "pictures" / "curve.png"
    draw_loss_curve(run_dir, path)
    pixels = imread(path)[..., :3]
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (np.abs(pixels - np.array(colour) / 255).max(axis=-1) < 0.02).sum() > 30
    assert [entry.name for entry in path.parent.iterdir()] == ["curve.png"]


def test_a_restart_leaves_a_mark_in_the_loss_curve(tmp_path: Path) -> None:
    plain, resumed = run_dir_in(tmp_path / "plain"), run_dir_in(tmp_path / "resumed")
    record(plain, 1, 0, 60)
    record(resumed, 1, 0, 45)
    record(resumed, 2, 40, 60)
    draw_loss_curve(plain, tmp_path / "plain.png")
    draw_loss_curve(resumed, tmp_path / "resumed.png")
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "resumed.png").read_bytes()


def test_a_run_without_a_loss_has_no_curve(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no loss"):
        draw_loss_curve(run_dir_in(tmp_path), tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("width", [60, 120])
def test_the_summary_tells_what_came_of_the_run(tmp_path: Path, width: int) -> None:
    run_dir = run_dir_in(tmp_path)
    record(run_dir, 1, 0, 50)
    record(run_dir, 2, 40, 100, "finished")
    run_dir.final_path.mkdir(parents=True)
    (run_dir.final_path / "adapter_config.json").write_text("{}")
    console = console_of(width)
    command = "tunesmith train run.yaml --max_steps 200 --run_name a-name-that-is-rather-long"
    console.print(format_summary(run_dir, [("go on", command)]), soft_wrap=True)
    shown = written_to(console)
    flat = " ".join(shown.split())
    for words in (
        "run a-run",
        "state finished: all steps are done",
        f"loss 4.0000 -> {loss_at(80):.4f} on the validation set, from step 0 to 80",
        f"{loss_at(100) + 0.5:.4f} at the end",
        "steps 100 of 100",
        "speed 1,234 tokens/s",
        "memory 3.00 GiB",
        "in 2 attempts",
        f"adapter {run_dir.final_path}",
        f"run folder {run_dir.path}",
        f"go on: {command}",
    ):
        assert words in flat, words
    assert "\x1b" not in shown
    table = shown[: shown.index("adapter")]
    assert all(len(line.rstrip()) <= width for line in table.splitlines())
    for copied in (str(run_dir.path), command):
        assert copied in shown, "what is to be copied is not broken"


def test_the_summary_without_evaluation_compares_training_losses(tmp_path: Path) -> None:
    run_dir = run_dir_in(tmp_path)
    log = MetricsLog(run_dir.metrics_path, 1, {})
    for step in range(1, 41):
        log.training(step, {**training_values(step), "loss": 3.0 if step <= 20 else 2.0})
    log.event(40, "stopped", "asked to stop")
    log.close()
    console = console_of(100)
    console.print(format_summary(run_dir))
    assert "3.0000 -> 2.0000 in training" in written_to(console)
    assert "stopped: asked to stop" in written_to(console)
    assert "steps       40 of 100" in written_to(console)


def test_the_summary_of_a_run_that_never_began_does_not_fail(tmp_path: Path) -> None:
    console = console_of(60)
    console.print(format_summary(run_dir_in(tmp_path)))
    assert "none measured" in written_to(console)
