"""Every setting of `tunesmith evaluate` changes what an evaluation does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from support.runs import small_config, start, train_here
from support.scores import minilm_folder
from support.tokenizers import CHATML_TEMPLATE
from tunesmith.cluster.pool import choose_pool
from tunesmith.cluster.resources import Node
from tunesmith.config import EvaluateConfig, ModelRef
from tunesmith.errors import TunesmithError
from tunesmith.evaluate.engines.choose import vllm_is_installed
from tunesmith.evaluate.metrics.score import choose_metrics
from tunesmith.evaluate.passes import Served, make_spec, plan_requests
from tunesmith.evaluate.plan import evaluation_folder, make_plan
from tunesmith.runs.folder import RunDir
from tunesmith.runs.tuned import find_tuned

pytestmark = pytest.mark.usefixtures("alone")

ModelOf = Callable[[str], Path]

CHANGED: dict[str, Any] = {
    "checkpoints_dir": "{folder}/model",
    "checkpoint": "latest",
    "base_model": "org/other",
    "model_path": "{folder}/model",
    "trust_remote_code": True,
    "home": "{folder}/elsewhere",
    "full_ft": True,
    "compare": "none",
    "test_dataset": "{folder}/rows.jsonl",
    "test_split": "validation",
    "test_config": "other",
    "input_template": "Say {{instruction}} ",
    "output_template": "So {{output}}",
    "field_mapping": {"instruction": "question", "output": "question"},
    "message_keys": {"content": "text"},
    "role_names": {"assistant": "bot"},
    "system_prompt": "Be brief.",
    "chat_template": "{folder}/louder.jinja",
    "unrendered": "count",
    "max_samples": 2,
    "engine": "vllm",
    "batch_size": 3,
    "max_tokens": 7,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "seed": 1,
    "max_model_len": 30,
    "dtype": "bfloat16",
    "metrics": ["chrf"],
    "bertscore_model": "{encoder}",
    "tensor_parallel_size": 2,
    "gpu_memory_utilization": 0.5,
    "num_replicas": 1,
}
NODES = [Node(8, 4)]
# What these say is of test rows of one's own, as the run would read them; of conversations, which it can't.
OF_ROWS = {"test_config", "input_template", "output_template", "field_mapping"}
OF_CONVERSATIONS = {"message_keys", "role_names", "system_prompt", "chat_template", "unrendered"}


@pytest.fixture(scope="module")
def run(model_of: ModelOf, rows: Path, tmp_path_factory: pytest.TempPathFactory, alone: None) -> RunDir:
    folder = tmp_path_factory.mktemp("settings")
    shutil.copytree(model_of("llama"), folder / "model")
    shutil.copy(rows, folder / "rows.jsonl")
    (folder / "splits").mkdir()
    lines = rows.read_text().splitlines(keepends=True)
    for i, split in enumerate(("test", "validation")):
        (folder / "splits" / f"{split}.jsonl").write_text("".join(lines[i::2]))
    said = [
        ("user", "What is it?", "What?"),
        ("assistant", "It is this.", "This."),
        ("bot", "It is that.", "That."),
    ]
    messages = [{"role": role, "content": content, "text": text} for role, content, text in said]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    (folder / "tools.jsonl").write_text(json.dumps({"messages": messages[:2], "tools": tools}) + "\n")
    (folder / "chat.jinja").write_text(CHATML_TEMPLATE)
    (folder / "louder.jinja").write_text(CHATML_TEMPLATE.replace("im_start", "IM_START"))
    config = small_config(model_of("llama"), rows, folder / "home", save_total_limit=3, train_split_ratio=0.7)
    run = train_here(start(config))
    state = run.checkpoint_path(4) / "trainer_state.json"
    state.write_text(state.read_text().replace('"eval_loss": ', '"eval_loss": 1'))
    return run


def outcome(config: EvaluateConfig) -> dict[str, Any]:
    """Return everything that an evaluation on four GPUs would do, or the error that it ends with."""
    try:
        tuned = find_tuned(config)
        found = {
            "folder": tuned.folder,
            "base": tuned.base and (tuned.base.source, tuned.base.trust_remote_code),
        }
        if tuned.base is not None and tuned.base.folder is None:
            return found
        plan = make_plan(config, tuned, use_gpu=False)
        pool = choose_pool(config, NODES, "the cluster")
        references = [prompt.reference for prompt in plan.test_set.samples.values()]
        metrics, _ = choose_metrics(config.metrics, references, config.bertscore_model, "cpu")
        spec = make_spec(
            config,
            Served(ModelRef("model")),
            plan.dtype,
            plan.max_model_len,
            stop_token_ids=(0,),
        )
        return {
            **found,
            "engine": plan.engine,
            "results": evaluation_folder(config, tuned),
            "requests": plan_requests(plan.test_set, plan.variants),
            "metrics": [(metric.name, metric.details) for metric in metrics],
            "replicas": pool.num_replicas,
            "spec": asdict(spec),
        }
    except TunesmithError as error:
        return {"error": str(error)}


def test_every_setting_is_tried() -> None:
    assert list(EvaluateConfig.model_fields) and set(CHANGED) == set(EvaluateConfig.model_fields)


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_changes_the_evaluation(run: RunDir, name: str) -> None:
    folder = run.home.parent
    value = CHANGED[name]
    if isinstance(value, str):
        encoder = str(minilm_folder()) if "{encoder}" in value else ""
        value = value.format(folder=folder, encoder=encoder)
    if name == "engine" and vllm_is_installed():
        value = "transformers"
    fixed: dict[str, Any] = {"checkpoints_dir": str(run.path), "metrics": ["chrf", "exact_match"]}
    if name in ("home", "base_model"):
        fixed["checkpoints_dir"] = "run" if name == "home" else fixed["checkpoints_dir"]
        fixed["home"] = run.home
    if name == "bertscore_model":
        fixed["metrics"] = None
    if name == "test_split":
        fixed["test_dataset"] = folder / "splits"
    if name in OF_ROWS:
        fixed["test_dataset"] = folder / "rows.jsonl"
    if name in OF_CONVERSATIONS:
        chats = folder / ("tools.jsonl" if name == "unrendered" else "chats.jsonl")
        fixed |= {"checkpoints_dir": str(folder / "model"), "test_dataset": chats}
        fixed["chat_template"] = str(folder / "chat.jinja")
    before = outcome(EvaluateConfig(**fixed))
    after = outcome(EvaluateConfig(**{**fixed, name: value}))
    if name == "unrendered":
        assert "leaves out the list of tools" in before.pop("error")
    assert "error" not in before
    assert after != before
    if "error" in after:
        assert name in ("engine", "full_ft", "home", "checkpoints_dir", "tensor_parallel_size"), after[
            "error"
        ]
