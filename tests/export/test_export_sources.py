"""Base models from the hub's cache, and those that bring their own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.commands import run_python
from support.exports import load, load_weights, logits_of, merge_by_peft, write_adapter
from support.own_code import REMOTE_MODEL
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer

pytestmark = pytest.mark.slow

EXPORT = """
import json, sys
from pathlib import Path
from tunesmith.config import ConvertConfig, TrainConfig
from tunesmith.errors import TunesmithError
from tunesmith.export.convert import export
from tunesmith.runs.tuned import TunedModel
adapter, output, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
try:
    export(TunedModel("adapter", adapter, TrainConfig(**settings).model), ConvertConfig(), output)
    print(json.dumps("done"))
except TunesmithError as error:
    print(json.dumps(error.message))
"""


def export_apart(adapter: Path, output: Path, home: Path, **settings: object) -> str:
    """Export in a process of its own, which reads the hub's cache in `home`; return its error, or "done"."""
    said = run_python(EXPORT, adapter, output, json.dumps(settings), HF_HOME=str(home), HF_HUB_OFFLINE="1")
    return str(said)


def test_a_base_model_is_read_from_the_hub_s_cache_at_its_revision(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--tiny"
    (cache / "refs").mkdir(parents=True)
    bases = {}
    for digit, family in (("1", "qwen3"), ("2", "mistral")):
        bases[digit] = cache / "snapshots" / (digit * 40)
        save_model(bases[digit], build_tokenizer("byte_bpe"), family)
    (cache / "refs" / "main").write_text("1" * 40)
    for digit, revision in (("1", None), ("2", "2" * 40)):
        adapter = write_adapter(bases[digit], tmp_path / f"adapter{digit}", target_modules=["q_proj"]).folder
        output = tmp_path / f"out{digit}"
        said = export_apart(adapter, output, tmp_path, hf_model_id="org/tiny", model_revision=revision)
        assert said == "done"
        expected = logits_of(merge_by_peft(bases[digit], adapter))
        torch.testing.assert_close(logits_of(load(output)), expected, rtol=1e-4, atol=1e-4)
        assert "base_model: org/tiny\n" in (output / "README.md").read_text()
    said = export_apart(adapter, tmp_path / "out", tmp_path, hf_model_id="org/absent")
    assert "`org/absent`" in said


def test_a_model_s_own_code_goes_with_it(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = write_adapter(model_of("llama"), tmp_path / "adapter", target_modules=["q_proj"]).folder
    base = shutil.copytree(model_of("llama"), tmp_path / "own")
    content = json.loads((base / "config.json").read_text())
    content |= {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (base / "config.json").write_text(json.dumps(content))
    (base / "own.py").write_text(REMOTE_MODEL)
    output = tmp_path / "out"
    settings = {"model_path": str(base), "trust_remote_code": True}
    assert export_apart(adapter, output, tmp_path, **settings) == "done"
    assert (output / "own.py").read_text() == REMOTE_MODEL
    assert json.loads((output / "config.json").read_text())["auto_map"] == content["auto_map"]
    assert load_weights(output).keys() == load_weights(base).keys()
