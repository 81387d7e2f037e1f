"""Every setting of `tunesmith chat` and `tunesmith serve` changes what they do."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from support.runs import copy_run
from tunesmith.config import ChatConfig, ServeConfig, TunedModelConfig
from tunesmith.errors import TunesmithError
from tunesmith.runs.folder import RunDir
from tunesmith.runs.tuned import find_tuned
from tunesmith.serving.chat import open_chat
from tunesmith.serving.flags import make_flags
from tunesmith.serving.models import find_served

pytestmark = pytest.mark.usefixtures("alone")

WHICH: dict[str, Any] = {
    "checkpoints_dir": "{folder}/model",
    "checkpoint": "latest",
    "base_model": "org/other",
    "model_path": "{folder}/other",
    "trust_remote_code": True,
    "home": "{folder}/elsewhere",
}
CHAT: dict[str, Any] = {
    **WHICH,
    "compare": "base",
    "system_prompt": "Be brief.",
    "max_tokens": 3,
    "temperature": 2.0,
    "top_k": 1,
    "top_p": 0.01,
    "seed": 1,
    "dtype": "bfloat16",
    "use_gpu": True,
}
SERVE: dict[str, Any] = {
    **WHICH,
    "more": ["again={run}"],
    "host": "0.0.0.0",
    "port": 8001,
    "dtype": "bfloat16",
    "max_model_len": 64,
    "tensor_parallel_size": 2,
    "gpu_memory_utilization": 0.5,
    "use_gpu": True,
}
SAMPLED = ("top_k", "top_p", "seed")
OF_GPUS = ("tensor_parallel_size", "gpu_memory_utilization")


@pytest.fixture(scope="module")
def run(of_chats: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A copy whose best checkpoint isn't its latest, beside two copies of its base."""
    folder = tmp_path_factory.mktemp("settings")
    for name in ("model", "other"):
        shutil.copytree(of_chats.home.parent / "base", folder / name)
    run = copy_run(of_chats, folder / "home")
    state = run.checkpoint_path(24) / "trainer_state.json"
    state.write_text(state.read_text().replace('"eval_loss": ', '"eval_loss": 1'))
    return run


def of_model(config: TunedModelConfig) -> dict[str, Any]:
    tuned = find_tuned(config)
    return {"folder": tuned.folder, "base": tuned.base}


def chatted(config: ChatConfig, caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """Return what a chat would be, and what it answers, or the error that it ends with."""
    caplog.clear()
    try:
        found = of_model(config)
        if found["base"] is not None and found["base"].folder is None:
            return found
        with open_chat(config) as chat:
            prompt_ids = chat.prompt_ids({"user": "1 plus 2?"})
            answers = [chat.ask(prompt_ids, speaker, lambda piece: None) for speaker in chat.speakers]
            return {**found, "prompt": prompt_ids, "answers": answers, "told": caplog.messages}
    except TunesmithError as error:
        return {"error": str(error)}


def served(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what would be served, on a machine with four GPUs where some are asked for."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=1 << 30))
    try:
        found = of_model(config)
        if found["base"] is not None and found["base"].folder is None:
            return found
        return {**found, "flags": make_flags(config, find_served(config)).words}
    except TunesmithError as error:
        return {"error": str(error)}


def filled(value: Any, run: RunDir) -> Any:
    if isinstance(value, list):
        return [filled(item, run) for item in value]
    return value.format(folder=run.home.parent, run=run.path) if isinstance(value, str) else value


def fixed_for(name: str, run: RunDir) -> dict[str, Any]:
    if name in ("home", "base_model"):
        return {"checkpoints_dir": "talk" if name == "home" else str(run.path), "home": run.home}
    return {"checkpoints_dir": str(run.path)}


def test_every_setting_is_tried() -> None:
    assert set(CHAT) == set(ChatConfig.model_fields)
    assert set(SERVE) == set(ServeConfig.model_fields)


@pytest.mark.parametrize("name", CHAT)
def test_a_setting_changes_the_chat(run: RunDir, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fixed = {**fixed_for(name, run), "max_tokens": 12}
    if name in SAMPLED:
        fixed["temperature"] = 2.0
    if name == "max_tokens":  # of the tuned model's answers the end comes earlier
        fixed["compare"] = "base"
    before = chatted(ChatConfig(**fixed), caplog)
    after = chatted(ChatConfig(**{**fixed, name: filled(CHAT[name], run)}), caplog)
    assert "error" not in before
    assert after != before
    assert "error" not in after or name in ("home", "use_gpu"), after


@pytest.mark.parametrize("name", SERVE)
def test_a_setting_changes_the_server(run: RunDir, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = {**fixed_for(name, run), "use_gpu": name in OF_GPUS}
    before = served(ServeConfig(**fixed), monkeypatch)
    after = served(ServeConfig(**{**fixed, name: filled(SERVE[name], run)}), monkeypatch)
    assert "error" not in before
    assert after != before
    assert "error" not in after or name == "home", after
