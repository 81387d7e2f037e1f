"""Names that a disk has no room for are refused by setting and limit, or shortened where they follow from others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.runs import small_config, write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.cli import main
from tunesmith.config import EvaluateConfig, ModelRef, TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.evaluate.plan import evaluation_folder
from tunesmith.export.folder import new_folder
from tunesmith.paths import shorten_name
from tunesmith.runs.identity import locate_run
from tunesmith.runs.tuned import TunedModel


@pytest.mark.parametrize("home", ["--home=home", None])
@pytest.mark.parametrize("name", ["r" * 243, "r" * 255, "r" * 5000, "名" * 90])
def test_a_run_s_name_is_refused_with_its_limit(
    name: str,
    home: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in ("train", "inspect", "plan", "render"):
        assert main([verb, f"--run_name={name}", *([home] if home else [])]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: `--run_name` is") and "242 at most" in printed
    assert not [*tmp_path.iterdir()]


def test_the_longest_name_that_a_disk_takes_is_taken(tmp_path: Path) -> None:
    for name in ("r" * 242, "名" * 80):
        run = locate_run(TrainConfig(run_name=name, home=tmp_path))
        run.path.mkdir(parents=True)
        run.write_params({})


@pytest.mark.parametrize(
    ("verb", "setting"),
    [("train", "home"), ("train", "data_dir"), ("train", "results_dir"), ("convert", "output_dir"),
     ("evaluate", "home"), ("evaluate", "checkpoints_dir")],
)  # fmt: skip
def test_other_names_are_refused_by_setting(
    verb: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("n" * 256, "名" * 86):
        assert main([verb, f"--{setting}={text}"]) == 2
        printed = capsys.readouterr().err
        assert f"`--{setting}` is" in printed and "255 at most" in printed
        assert "Traceback" not in printed


def test_a_name_that_follows_from_the_model_s_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = save_model(tmp_path / ("m" * 240), build_tokenizer("byte_bpe"))
    config = small_config(model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "home", run_name=None)

    with pytest.raises(ConfigError, match="the run's name, by default") as raised:
        locate_run(config)
    assert raised.value.hint is not None and "--run_name" in raised.value.hint
    assert locate_run(config.model_copy(update={"run_name": "short"})).run_name == "short"


def test_a_disk_with_shorter_names_tells_its_own_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pathconf", lambda *_: 143)  # as an encrypted home answers
    config = TrainConfig(home=tmp_path, run_name="r" * 130)
    assert locate_run(config).run_name == config.run_name
    with pytest.raises(ConfigError, match=r"144 bytes, and the disk of .* takes 143") as raised:
        locate_run(config.model_copy(update={"run_name": "r" * 131}))
    assert raised.value.hint == "give a --run_name of at most 130 bytes"


def test_an_export_s_name_leaves_room_for_what_is_written_beside_it(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="`output_dir` has a name of 238 bytes"),
        new_folder(tmp_path / ("n" * 238), False, []),
    ):
        pass
    with new_folder(tmp_path / ("n" * 237), False, []) as folder:
        (folder / "config.json").touch()
    assert (tmp_path / ("n" * 237) / "config.json").is_file()


def test_an_evaluation_s_folder_is_cut_to_what_the_disk_takes(tmp_path: Path) -> None:
    folder = tmp_path / ("f" * 200)
    tuned = TunedModel("model", folder, ModelRef(folder))
    places = [
        evaluation_folder(EvaluateConfig(home=tmp_path, test_dataset=f"{'名' * 80}{i}.jsonl"), tuned)
        for i in range(2)
    ]
    assert places[0] != places[1]
    for place in places:
        place.mkdir(parents=True)
        assert len(os.fsencode(place.name)) <= 255
    assert shorten_name("short-rows", 255) == "short-rows"
