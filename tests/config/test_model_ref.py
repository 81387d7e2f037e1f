"""Which model is meant, and what it is called."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tunesmith.config import ModelRef, TrainConfig

FOLDER = Path("models/tiny")


@pytest.mark.parametrize(
    ("given", "source", "name"),
    [
        ({"hf_model_id": "org/large"}, "org/large", "large"),
        ({"model_path": FOLDER}, FOLDER, "tiny"),
        ({"model_path": FOLDER, "hf_model_id": "org/large"}, FOLDER, "large"),
        ({}, "Qwen/Qwen3-8B", "Qwen3-8B"),
    ],
    ids=["hub", "folder", "folder of a hub's model", "default"],
)
def test_a_model_is_loaded_from_its_folder_and_called_by_its_id(
    given: dict[str, str], source: str | Path, name: str
) -> None:
    model = TrainConfig(**given).model
    assert (model.source, model.name) == (source, name)
    assert model.folder == (source if isinstance(source, Path) else None)
    assert pickle.loads(pickle.dumps(model)) == model


def test_a_revision_is_of_the_hub_alone() -> None:
    given = {"model_revision": "v2", "trust_remote_code": True}
    assert TrainConfig(hf_model_id="org/large", **given).model == ModelRef("org/large", "v2", True)
    assert TrainConfig(model_path=FOLDER, **given).model == ModelRef(FOLDER, None, True)
