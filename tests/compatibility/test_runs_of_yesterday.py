"""Runs of commit ab4f82f go on under the same command, and are evaluated and exported by what is built now.

The folder `ab4f82f` was made by that commit: `train_as_then.py`, in it, with its `settings.json`. `runs/whole` is a
finished run (without its resumable state, which nobody reads any more), the unnamed one beside it was killed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from processor import processor
from safetensors.torch import load_file

from support.paths import REPOSITORY
from support.runs import losses, start, train_here, write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import ConvertConfig, EvaluateConfig, TrainConfig
from tunesmith.evaluate.plan import make_plan
from tunesmith.export.convert import export
from tunesmith.model.adapters.lora import ADAPTER_WEIGHTS
from tunesmith.model.files.state import read_weights
from tunesmith.runs.folder import RunDir, open_run
from tunesmith.runs.identity import drops_by_token, locate_run
from tunesmith.runs.templates import with_recorded_templates
from tunesmith.runs.tuned import find_tuned
from tunesmith.train.start import check_resumable

pytestmark = [pytest.mark.usefixtures("alone")]

COMMIT = "ab4f82f"
HERE = Path(__file__).parent
SETTINGS: dict[str, Any] = json.loads((HERE / COMMIT / "settings.json").read_text())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder that the command was given in."""
    monkeypatch.chdir(shutil.copytree(HERE / COMMIT, tmp_path / "project"))
    return tmp_path / "project"


def go_on(settings: dict[str, Any]) -> RunDir:
    """Give the command again."""
    config = TrainConfig(**settings)
    check_resumable(locate_run(config), config)
    return train_here(start(config))


def trace(run: RunDir) -> dict[str, dict[int, float]]:
    return {column: losses(run, column) for column in ("loss", "grad_norm", "eval_loss", "learning_rate")}


def weights_of(run: RunDir, step: int) -> dict[str, torch.Tensor]:
    folder = run.checkpoint_path(step)
    return (
        load_file(folder / ADAPTER_WEIGHTS) if (folder / ADAPTER_WEIGHTS).exists() else read_weights(folder)
    )


def test_an_unnamed_run_goes_on_under_the_same_command(project: Path) -> None:
    whole = open_run("whole", "runs")
    (killed,) = (run for run in Path("runs").iterdir() if run.name != "whole")
    tokens = sorted(killed.glob("datasets/*/tokens-*"))
    recorded = json.loads(next(killed.glob("results/*/*/*/params.json")).read_text())

    run = go_on(SETTINGS)

    assert run.home == project / killed
    assert sorted(killed.glob("datasets/*/tokens-*")) == tokens
    assert not drops_by_token(run.read_params())  # and so it dropped what it would have
    assert run.read_params()["model"]["fingerprint"] == recorded["model"]["fingerprint"]
    same_processor = processor() == json.loads((project / "made_on.json").read_text())
    tolerance = 0.0 if same_processor else 1e-6
    for column, expected in trace(whole).items():
        assert trace(run)[column] == pytest.approx(expected, rel=tolerance, abs=tolerance), column
    for name, expected in weights_of(whole, 4).items():
        torch.testing.assert_close(weights_of(run, 4)[name], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("run_name", [None, "named"])
def test_backslashes_of_a_template_mean_what_they_meant_to_the_run(
    project: Path, run_name: str | None
) -> None:
    config = TrainConfig(**{**SETTINGS, "run_name": run_name, "input_template": "{instruction}\n"})
    run = locate_run(config)
    shutil.copytree(open_run("whole", "runs").path, run.path)
    recorded = run.read_params()
    recorded["settings"]["input_template"] = config.input_template
    run.params_path.write_text(json.dumps(recorded))
    in_yaml = config.model_copy(update={"input_template": r"{instruction}\n"})
    assert with_recorded_templates(in_yaml) == config
    assert with_recorded_templates(config) == config
    new = in_yaml.model_copy(update={"seed": 1, "run_name": "new"})
    assert with_recorded_templates(new) == new


def test_a_finished_run_is_evaluated_with_its_base_its_templates_and_its_test_set(project: Path) -> None:
    config = EvaluateConfig(checkpoints_dir="whole", home=Path("runs"), engine="transformers")
    plan = make_plan(config, find_tuned(config), use_gpu=False)
    assert plan.base is not None and plan.base.folder == project / "model"
    assert plan.base_is_recorded
    assert plan.tuned.step == 4
    assert plan.test_set.path.is_relative_to(project / "runs/whole/datasets")
    assert all(
        prompt.text.endswith(" ") for prompt in plan.test_set.samples.values()
    )  # as the template has it


def test_a_finished_run_is_exported_and_proven(project: Path) -> None:
    for folder in ("runs/whole", "runs/whole/results/model/final"):
        tuned = find_tuned(ConvertConfig(checkpoints_dir=folder))
        proof = export(
            tuned, ConvertConfig(), project / "exported" / str(tuned.step) / Path(folder).name
        ).proof
        assert proof is not None
        assert proof.way == "whole"


@pytest.fixture(scope="module")
def code_of_then(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as that commit has it."""
    archive = subprocess.run(
        ["git", "archive", COMMIT, "src"], cwd=REPOSITORY, capture_output=True, check=False
    )
    if archive.returncode:
        pytest.skip(f"the commit {COMMIT} isn't here: `git fetch --unshallow` gets it")
    folder = tmp_path_factory.mktemp("then")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder / "src"


@pytest.mark.slow
def test_half_of_a_run_then_and_half_now_equal_the_whole_run_then(
    code_of_then: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On whatever processor this runs: bit for bit, with LoRA and without."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", build_tokenizer("byte_bpe"), "qwen3")
    write_rows(tmp_path / "rows.jsonl")
    cases = {"whole": SETTINGS, "whole-full": {**SETTINGS, "full_ft": True}}
    trained = subprocess.run(
        [sys.executable, HERE / "train_as_then.py", json.dumps([*cases.values()])],
        env={"PYTHONPATH": str(code_of_then), "HF_HUB_OFFLINE": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert trained.returncode == 0, trained.stderr
    for name, settings in cases.items():
        run, whole = go_on(settings), open_run(name, "runs")
        assert run.run_name.startswith("model-")
        assert trace(run) == trace(whole)
        ours, theirs = weights_of(run, 4), weights_of(whole, 4)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[weight], theirs[weight]) for weight in ours)
