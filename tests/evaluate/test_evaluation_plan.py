"""What an evaluation works with: whose answers it keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from support.exports import convert, write_adapter
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import EvaluateConfig, ModelRef
from tunesmith.evaluate.plan import make_plan
from tunesmith.runs.tuned import TunedModel


def test_a_base_s_answers_are_never_taken_for_those_of_its_merged_export(tmp_path: Path) -> None:
    """Their first MiB is the same: head and embeddings fill it."""
    shape = {"hidden_size": 1024, "intermediate_size": 16, "num_hidden_layers": 1}
    base = save_model(tmp_path / "base", build_tokenizer("byte_bpe"), "qwen3", **shape)
    tuned = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    merged = shutil.copytree(base, tmp_path / "merged")
    shutil.copy(convert(tuned, tmp_path / "export") / "model.safetensors", merged)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input": "a question", "output": "an answer"}) + "\n")
    config = EvaluateConfig(test_path=tmp_path / "rows.jsonl", engine="transformers")

    def identity_on(base: Path) -> dict[str, object]:
        return make_plan(config, TunedModel("adapter", tuned.folder, ModelRef(base)), use_gpu=False).identity(
            config
        )

    ours, theirs = identity_on(base), identity_on(merged)
    assert {name for name in ours if ours[name] != theirs[name]} == {"base_model"}
    assert identity_on(shutil.copytree(base, tmp_path / "copy")) == ours
