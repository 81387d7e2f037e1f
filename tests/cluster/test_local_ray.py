"""A training on a Ray of our own, beside what another Ray has left on the machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from support.commands import Command
from support.runs import small_config, write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer


@pytest.mark.ray
@pytest.mark.slow
def test_no_process_of_our_own_ray_asks_another_cluster_or_serves_a_dashboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides, its workers find the hub's cache that `HF_HOME` names by a relative path: they stand in another folder."""
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "hf/hub/models--org--tiny"
    save_model(cache / "snapshots" / ("1" * 40), build_tokenizer("byte_bpe"), "llama")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("1" * 40)
    rows = write_rows(tmp_path / "rows.jsonl")
    config = small_config("none", rows, tmp_path / "home", hf_model_id="org/tiny")
    # A short path: Ray's sockets lie in it.
    with tempfile.TemporaryDirectory() as folder:
        ray_folder = Path(folder, "ray")
        ray_folder.mkdir()
        # As `ray start` leaves it behind when its cluster is killed.
        (ray_folder / "ray_current_cluster").write_text("127.0.0.1:1")
        command = Command(config, RAY_TMPDIR=folder, HF_HOME="hf")
        assert command.wait() == 0, command.output()
        logs = {path.name: path.read_text() for path in ray_folder.glob("session_2*/logs/*.err")}
    actors = [text for name, text in logs.items() if name.startswith("worker-")]
    assert any(":actor_name:RayTrainWorker" in text for text in actors)
    assert not [text for text in actors if "PlacementGroupCleaner" in text]
    assert not [name for name in logs if name.startswith("dashboard_") and name.endswith("Head.err")]
