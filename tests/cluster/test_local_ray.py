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
def test_no_process_of_our_own_ray_asks_another_cluster_or_serves_a_dashboard(tmp_path: Path) -> None:
    model = save_model(tmp_path / "tiny", build_tokenizer("byte_bpe"), "llama")
    config = small_config(model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "home")
    # A short path: Ray's sockets lie in it.
    with tempfile.TemporaryDirectory() as folder:
        ray_folder = Path(folder, "ray")
        ray_folder.mkdir()
        # As `ray start` leaves it behind when its cluster is killed.
        (ray_folder / "ray_current_cluster").write_text("127.0.0.1:1")
        command = Command(config, RAY_TMPDIR=folder)
        assert command.wait() == 0, command.output()
        logs = {path.name: path.read_text() for path in ray_folder.glob("session_2*/logs/*.err")}
    actors = [text for name, text in logs.items() if name.startswith("worker-")]
    assert any(":actor_name:RayTrainWorker" in text for text in actors)
    assert not [text for text in actors if "PlacementGroupCleaner" in text]
    assert not [name for name in logs if name.startswith("dashboard_") and name.endswith("Head.err")]
