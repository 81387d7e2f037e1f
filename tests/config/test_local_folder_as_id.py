"""A local folder may be given where a hub id is meant to be, as other tools take both there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.runs import small_config, write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.chart.places import refuse_relative_paths
from tunesmith.cli import main
from tunesmith.cluster.ray_train import _for_every_node
from tunesmith.config import EvaluateConfig, TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.runs.base_model import recorded_base
from tunesmith.runs.identity import locate_run
from tunesmith.train.same_run import find_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(tmp_path / "plain", build_tokenizer("byte_bpe"))
    shutil.copytree(tmp_path / "plain", tmp_path / "models/tiny")
    write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "folder"),
    [("./plain", "plain"), ("plain", "plain"), ("models/tiny", "models/tiny"), ("~/plain", "plain"),
     ("../{parent}/plain", "plain"), ("{here}/plain", "plain")],
)  # fmt: skip
def test_it_is_that_folder_by_its_whole_path(given: str, folder: str, here: Path) -> None:
    config = TrainConfig(hf_model_id=given.format(parent=here.name, here=here))
    assert config.model.folder is not None
    assert config.model.folder.resolve() == here / folder and config.model.folder.is_absolute()
    assert config.model.name == Path(folder).name
    # What workers, which stand in another folder, are told.
    assert _for_every_node(config, locate_run(config)).model.folder == config.model.folder


def test_ids_of_the_hub_stay_what_they_are(here: Path) -> None:
    for name in ("org/large", "gpt2", "models/huge"):
        assert TrainConfig(hf_model_id=name).model.source == name


@pytest.mark.parametrize("verb", ["train", "plan", "inspect"])
@pytest.mark.parametrize("given", ["./nowhere", "~/nowhere", "models/no/where"])
def test_a_folder_that_isn_t_there_is_refused_at_once(
    given: str, verb: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset_name=rows.jsonl", "--input_template={question}", "--output_template={answer}"]
    assert main([verb, f"--hf_model_id={given}", *words]) == 2
    printed = capsys.readouterr().err
    assert "`hf_model_id` is" in printed and "which is not a folder" in printed
    assert "--model_path" in printed.split("hint: ")[1]


def test_the_run_is_the_same_by_either_spelling_and_its_base_is_found_from_elsewhere(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.runs import start

    config = small_config("none", "rows.jsonl", here / "home", hf_model_id="./plain", run_name=None)
    run = start(config).run
    assert find_run(config.model_copy(update={"hf_model_id": str(here / "plain")})).path == run.path

    monkeypatch.chdir("/")
    evaluated = EvaluateConfig()
    base = recorded_base(evaluated, config, run.read_params(), run.path, trusts=True)
    assert base.folder == here / "plain"


def test_a_cluster_is_told_no_folder_of_this_machine_s(here: Path) -> None:
    for given in ("./plain", "models/tiny"):
        with pytest.raises(ConfigError, match=f"`hf_model_id` is `{Path(given)}`: relative"):
            refuse_relative_paths(TrainConfig(hf_model_id=given), own_home=True)
