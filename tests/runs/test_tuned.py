"""Which tuned model is taken: by what the run recorded, never by a file's time, and never a torn one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.runs import small_config, start, train_here
from tunesmith.config import ConvertConfig, EvaluateConfig
from tunesmith.errors import ConfigError, ModelError, RunError
from tunesmith.export.final import write_final
from tunesmith.runs.folder import RunDir
from tunesmith.runs.tuned import TunedModel, find_tuned, taken

pytestmark = [pytest.mark.usefixtures("alone")]

ModelOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def run(model_of: ModelOf, rows: Path, tmp_path_factory: pytest.TempPathFactory, alone: None) -> RunDir:
    """A finished LoRA run with checkpoints at steps 2, 4 and 6, of which the middle one is the best."""
    home = tmp_path_factory.mktemp("homes") / "first"
    config = small_config(model_of("llama"), rows, home, max_steps=6, save_total_limit=3)
    run = train_here(start(config))
    for step, loss in ((2, 5.0), (4, 4.0), (6, 4.5)):
        path = run.checkpoint_path(step) / "trainer_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eval_loss": loss}))
    write_final(run, config.model)
    return run


def find(where: Path | str | None = None, **settings: Any) -> TunedModel:
    named = {} if where is None else {"checkpoints_dir": str(where)}
    return find_tuned(EvaluateConfig(**named, **settings))


@pytest.mark.parametrize(("checkpoint", "step"), [("best", 4), ("latest", 6), ("2", 2), ("000004", 4)])
def test_the_checkpoint_is_chosen_by_what_the_run_recorded(
    run: RunDir, checkpoint: str, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (4, 6, 2):  # the times of the files say something else
        os.utime(run.checkpoint_path(number), (time.time() + number, time.time() + number))
    caplog.set_level(logging.INFO)
    with taken(EvaluateConfig(checkpoints_dir=str(run.path), checkpoint=checkpoint), "a_log") as tuned:
        pass
    assert (tuned.kind, tuned.step, tuned.folder) == ("adapter", step, run.checkpoint_path(step))
    assert tuned.run == run
    assert f"checkpoint_{step:08d} of run" in caplog.text
    assert caplog.messages[-1] in run.log_path("a_log").read_text()
    if checkpoint == "best":
        assert "validation loss of 4.0000" in caplog.text


@pytest.mark.parametrize("where", ["run", "home", "name", "nothing", "homes"])
def test_a_run_is_found_by_its_folder_home_name_or_by_nothing(run: RunDir, where: str) -> None:
    settings: dict[str, Any] = {
        "run": {"where": run.path},
        "home": {"where": run.home},
        "name": {"where": "run", "home": run.home},
        "nothing": {"home": run.home},
        "homes": {"home": run.home.parent},
    }[where]
    assert find(**settings).run == run


def test_nothing_means_the_newest_run_of_the_base_model(
    run: RunDir, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    home = tmp_path / "runs"
    shutil.copytree(run.home, home / "old")
    newer = train_here(start(small_config(model_of("qwen3"), rows, home / "new", max_steps=2)))
    os.utime(newer.params_path, (0, 0))
    assert find(home=home).run == newer
    old = find(home=home, base_model="anyone/llama").run
    assert old is not None
    assert old.home == home / "old"
    with pytest.raises(RunError, match="no run of `Qwen3-8B`") as error:
        find(home=home, base_model="Qwen/Qwen3-8B")
    assert "`llama`, `qwen3`" in str(error.value)
    with pytest.raises(RunError, match="there is no run under"):
        find(home=tmp_path / "empty")


def test_a_checkpoint_named_itself_is_taken(run: RunDir) -> None:
    assert find(run.checkpoint_path(2)).step == 2
    with pytest.raises(ConfigError, match="that of step 2"):
        find(run.checkpoint_path(2), checkpoint="latest")


def test_unfinished_checkpoints_are_never_taken(run: RunDir, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(run.home, home)
    copy = RunDir(home, run.results_dir, run.model_name, run.run_name)
    unfinished = copy.unfinished_path(8, "abc")
    shutil.copytree(copy.checkpoint_path(6), unfinished)
    torn = copy.checkpoint_path(10)
    shutil.copytree(copy.checkpoint_path(6), torn)
    (torn / "trainer_state.json").unlink()
    assert find(copy.path, checkpoint="latest").step == 6
    with pytest.raises(RunError, match="never finished"):
        find(unfinished)
    with pytest.raises(RunError, match=r"no checkpoint of step 10.*\n.*2, 4, 6"):
        find(copy.path, checkpoint="10")
    for step in (2, 4, 6):
        shutil.rmtree(copy.checkpoint_path(step))
    with pytest.raises(RunError, match="no whole checkpoint yet"):
        find(copy.path)


def test_the_runs_base_model_and_settings_come_with_it(
    run: RunDir, model_of: ModelOf, tmp_path: Path
) -> None:
    tuned = find(run.path)
    assert tuned.base is not None
    assert tuned.base.folder == model_of("llama")
    assert tuned.dataset.input_template == "{instruction} "
    assert tuned.dataset.gives_template
    shutil.copytree(model_of("llama"), tmp_path / "elsewhere")
    moved = find(run.path, model_path=tmp_path / "elsewhere")
    assert moved.base is not None
    assert moved.base.folder == tmp_path / "elsewhere"
    hub = find(run.path, base_model="org/other")
    assert hub.base is not None
    assert hub.base.source == "org/other"


def test_final_knows_its_run(run: RunDir) -> None:
    tuned = find(run.final_path)
    assert (tuned.kind, tuned.run, tuned.step, tuned.eval_loss) == ("adapter", run, 4, 4.0)


def test_a_checkpoint_copied_elsewhere_knows_its_base_and_data(run: RunDir, tmp_path: Path) -> None:
    shutil.copytree(run.checkpoint_path(4), tmp_path / "copy")
    tuned = find(tmp_path / "copy")
    assert (tuned.kind, tuned.run, tuned.step) == ("adapter", None, 4)
    assert tuned.params is not None
    assert tuned.base is not None
    assert tuned.dataset.input_template == "{instruction} "


def test_a_full_checkpoint_is_sharded_state(model_of: ModelOf, rows: Path, tmp_path: Path) -> None:
    run = train_here(start(small_config(model_of("llama"), rows, tmp_path, max_steps=2, full_ft=True)))
    assert find(run.path).kind == "state"


def test_any_adapter_or_model_folder_will_do(run: RunDir, model_of: ModelOf, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run.checkpoint_path(4) / name, adapter)
    tuned = find(adapter)
    assert (tuned.kind, tuned.run, tuned.params) == ("adapter", None, None)
    assert tuned.base is not None
    assert tuned.base.folder == model_of("llama")

    model = find(model_of("qwen3"))
    assert (model.kind, model.base) == ("model", None)
    with_base = find(model_of("qwen3"), model_path=model_of("llama"))
    assert with_base.base is not None

    content = json.loads((adapter / "adapter_config.json").read_text())
    for recorded, message in ((None, "doesn't record its base"), ("/nowhere/at/all", "is not there")):
        (adapter / "adapter_config.json").write_text(
            json.dumps({**content, "base_model_name_or_path": recorded})
        )
        with pytest.raises(ModelError, match=message):
            find(adapter)


def test_convert_takes_the_same(run: RunDir) -> None:
    assert find_tuned(ConvertConfig(checkpoints_dir=str(run.path))) == find(run.path)


def test_a_lost_base_model_is_asked_for(run: RunDir, tmp_path: Path, model_of: ModelOf, rows: Path) -> None:
    shutil.copytree(model_of("llama"), tmp_path / "base")
    lost = train_here(start(small_config(tmp_path / "base", rows, tmp_path / "home", max_steps=2)))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match=r"is not there any more.*\n.*--model_path"):
        find(lost.path)


def test_a_folder_that_holds_one_model_has_no_other_checkpoint(run: RunDir) -> None:
    with pytest.raises(ConfigError, match="holds one model"):
        find(run.final_path, checkpoint="2")


def test_a_home_that_cant_be_written_gets_no_log_and_stops_nothing(
    run: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run.home, tmp_path / "home")
    shutil.rmtree(tmp_path / "home/logs", ignore_errors=True)
    (tmp_path / "home/logs").write_text("a file where the folder should be")
    with taken(EvaluateConfig(checkpoints_dir=str(tmp_path / "home")), "a_log") as tuned:
        assert tuned.step == 4
    assert "there will be no log" in caplog.text


def test_a_runs_word_on_foreign_code_counts_in_its_home_alone(run: RunDir, tmp_path: Path) -> None:
    shutil.copytree(run.home, tmp_path / "home")
    copy = RunDir(tmp_path / "home", run.results_dir, run.model_name, run.run_name)
    for path in (copy.params_path, copy.checkpoint_path(4) / "params.json"):
        path.write_text(path.read_text().replace('"trust_remote_code": false', '"trust_remote_code": true'))
    shutil.copytree(copy.checkpoint_path(4), tmp_path / "sent")
    trusted = [
        find(copy.path).base,
        find(tmp_path / "sent").base,
        find(tmp_path / "sent", trust_remote_code=True).base,
    ]
    assert [base and base.trust_remote_code for base in trusted] == [True, False, True]
