"""A run's checkpoints as Hugging Face folders: equal to what was trained, for every family."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoTokenizer

from support.exports import (
    assert_same_weights,
    convert,
    load,
    load_adapted,
    load_weights,
    logits_of,
    merge_by_peft,
    tuned_of,
)
from support.runs import copy_run, losses, small_config, start, train_here
from support.tiny_models import FAMILIES, save_model
from support.tokenizers import build_tokenizer
from tunesmith.config import ConvertConfig
from tunesmith.errors import ConfigError
from tunesmith.export.convert import export
from tunesmith.export.final import write_final
from tunesmith.model.files.state import read_weights
from tunesmith.runs.folder import RunDir
from tunesmith.runs.tuned import find_tuned

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.slow]

ModelOf = Callable[[str], Path]
Trained = Callable[..., RunDir]

NAMED = {
    "phi3": {"lora_target_modules": ["qkv_proj", "layers.1.mlp.down_proj"]},
    "mixtral": {
        "lora_target_modules": ["q_proj", "experts.gate_up_proj", "experts.down_proj"],
        "lora_dropout": 0,
    },
    "llama": {"lora_target_modules": ["q_proj", "embed_tokens"]},
    "gemma": {"lora_target_modules": ["v_proj", "lm_head"]},
}


def train(model: Path, rows: Path, home: Path, **changes: Any) -> RunDir:
    return train_here(start(small_config(model, rows, home, lora_alpha=6, **changes)))


@pytest.fixture(scope="module")
def trained(
    model_of: ModelOf, rows: Path, tmp_path_factory: pytest.TempPathFactory, alone: None
) -> Callable[..., RunDir]:
    """`trained(family, name=value, …)` is a run with these settings, trained once; what changes it takes a copy."""
    folder = tmp_path_factory.mktemp("trained")
    runs: dict[str, RunDir] = {}

    def train_once(family: str, **changes: Any) -> RunDir:
        key = json.dumps([family, changes], sort_keys=True)
        if key not in runs:
            runs[key] = train(model_of(family), rows, folder / str(len(runs)), **changes)
        return runs[key]

    return train_once


@pytest.mark.parametrize("way", ["default", "named, rank-stabilized"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_of_an_adapter_is_base_and_adapter(
    family: str, way: str, model_of: ModelOf, trained: Trained, tmp_path: Path
) -> None:
    base = model_of(family)
    named = NAMED.get(family, {"lora_target_modules": ["q_proj", "down_proj"]})
    tuned = tuned_of(trained(family, **({} if way == "default" else {**named, "use_rslora": True})))
    exported = export(tuned, ConvertConfig(max_shard_size="60KB"), tmp_path / "out")
    assert exported.num_files > 1

    adapted = load_adapted(base, tuned.folder)
    expected = logits_of(adapted)
    assert float((expected - logits_of(load(base))).abs().max()) > 0.05
    torch.testing.assert_close(logits_of(load(exported.folder)), expected, rtol=1e-4, atol=1e-4)
    assert_same_weights(exported.folder, adapted.merge_and_unload(), torch.float32)
    assert load_weights(base).keys() - {"lm_head.weight"} == load_weights(exported.folder).keys() - {
        "lm_head.weight"
    }, "the files hold what the base's files hold"

    proof = exported.proof
    assert proof is not None
    assert (proof.way, proof.num_flips) == ("whole", 0)
    assert proof.logits_error is not None and proof.logits_error <= 1e-4
    assert proof.distance is not None and proof.distance < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_of_a_full_checkpoint_is_the_trained_model(
    family: str, model_of: ModelOf, trained: Trained, tmp_path: Path
) -> None:
    tuned = tuned_of(trained(family, full_ft=True))
    exported = export(tuned, ConvertConfig(max_shard_size="60KB"), tmp_path / "out")
    found = load(exported.folder).state_dict()
    weights = read_weights(tuned.folder)
    assert [name for name in weights if not torch.equal(found[name], weights[name])] == []
    assert load_weights(exported.folder).keys() == load_weights(model_of(family)).keys()
    assert exported.proof is not None
    assert exported.proof.num_inexact == 0


def test_a_bfloat16_base_gives_a_bfloat16_export_rounded_once(rows: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", build_tokenizer("byte_bpe"), "qwen3", torch.bfloat16)
    tuned = tuned_of(train(base, rows, tmp_path / "home"))
    exported = export(tuned, ConvertConfig(), tmp_path / "out")
    assert exported.dtypes == ("bfloat16",)
    assert json.loads((exported.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_weights(exported.folder, merge_by_peft(base, tuned.folder), torch.bfloat16)
    assert exported.proof is not None
    distance = exported.proof.distance
    assert distance is not None and distance > 1e-4, "the rounding is told"

    exact = export(tuned, ConvertConfig(dtype="float32"), tmp_path / "exact")
    assert exact.proof is not None and exact.proof.distance is not None
    assert exact.proof.distance < distance / 10
    assert exact.proof.num_flips == 0


def test_a_full_checkpoint_of_a_bfloat16_base_is_rounded_unless_float32_is_asked_for(
    rows: Path, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", build_tokenizer("byte_bpe"), "llama", torch.bfloat16)
    tuned = tuned_of(train(base, rows, tmp_path / "home", full_ft=True))
    trained = read_weights(tuned.folder)
    for dtype in ("auto", "float32", "float16"):
        exported = export(tuned, ConvertConfig(dtype=dtype), tmp_path / dtype)
        wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        for name, tensor in load_weights(exported.folder).items():
            assert tensor.dtype == wanted
            torch.testing.assert_close(tensor, trained[name].to(wanted), rtol=0, atol=0)
        assert "lm_head.weight" not in load_weights(exported.folder), "the tie is kept"


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_weights_unties_them(
    target: str, model_of: ModelOf, trained: Trained, tmp_path: Path
) -> None:
    run = trained("llama", lora_target_modules=["q_proj", target])
    folder = convert(tuned_of(run), tmp_path / "out")
    weights, base = load_weights(folder), load_weights(model_of("llama"))
    other = {"embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}[target]
    assert torch.equal(weights[f"{other}.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_adapter_exported_by_itself_is_the_adapter(
    model_of: ModelOf, trained: Trained, tmp_path: Path
) -> None:
    tuned = tuned_of(trained("qwen3"))
    exported = export(tuned, ConvertConfig(no_merge=True), tmp_path / "out")
    assert exported.form == "adapter"
    expected = logits_of(PeftModel.from_pretrained(load(model_of("qwen3")), tuned.folder))
    alone = AutoPeftModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float32).eval()
    assert torch.equal(logits_of(alone), expected)
    assert AutoTokenizer.from_pretrained(exported.folder)("an answer")["input_ids"]
    assert not (exported.folder / "state").exists()


def test_a_whole_model_has_no_adapter_to_export(trained: Trained, tmp_path: Path) -> None:
    tuned = tuned_of(trained("llama", full_ft=True))
    with pytest.raises(ConfigError, match="is a whole model") as error:
        export(tuned, ConvertConfig(no_merge=True), tmp_path / "out")
    assert error.value.hint == "leave --no_merge out"
    assert not (tmp_path / "out").exists()


def test_the_folder_says_what_it_was_made_from(
    trained: Trained, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    run = copy_run(trained("llama"), tmp_path / "home")
    tuned = tuned_of(run)
    interval = {"mean": 0.5, "low": 0.25, "high": 0.75}
    scores = {
        "metrics": {"rougeL": {"label": "ROUGE-L F1", "base": None, "tuned": interval, "difference": None}},
        "verdict": {"text": "The tuned model is better."},
        "num_samples": 3,
        "test_set": "/somewhere/sums.jsonl",
    }
    evaluation = run.evaluation_path(tuned.folder.name)
    evaluation.mkdir(parents=True)
    (evaluation / "scores.json").write_text(json.dumps(scores))
    folder = convert(tuned, tmp_path / "out")
    card = (folder / "README.md").read_text()
    for part in (
        "# llama, fine-tuned",
        "library_name: transformers",
        "`rows.jsonl`",
        "| `lora_rank` | `4` |",
        "| `max_steps` | `4` |",
        "3 samples of the test set `sums.jsonl`",
        f"{losses(run, 'eval_loss')[tuned.step or 0]:.4f} nats",
        "The tuned model is better.",
        "| ROUGE-L F1 |  | 0.5 (0.25 to 0.75) |  |",
    ):
        assert part in card
    assert "base_model:" not in card, "a local folder's name is none of the hub's"
    assert str(tmp_path_factory.getbasetemp()) not in card
    assert "/somewhere" not in card
    origin = json.loads((folder / "tunesmith.json").read_text())
    assert origin.pop("export")["no_merge"] is False
    assert (origin["run"], origin["checkpoint"]) == (run.path.name, tuned.folder.name)
    assert (origin["base"], origin["base_fingerprint"]) == (
        "llama",
        run.read_params()["model"]["fingerprint"],
    )
    assert origin["templates"] == {
        "input_template": "{instruction} ",
        "output_template": "{output}",
        "field_mapping": {"instruction": "question", "output": "answer"},
        "row_format": "template",
    }
    alone = convert(tuned, tmp_path / "alone", no_merge=True)
    of_alone = json.loads((alone / "tunesmith.json").read_text())
    assert of_alone.pop("export")["no_merge"] is True
    assert of_alone == origin


@pytest.mark.parametrize("full_ft", [False, True])
def test_final_says_what_an_export_says_and_a_killed_replacement_of_it_is_put_right(
    full_ft: bool, trained: Trained, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    run = copy_run(trained("llama", **({"full_ft": True} if full_ft else {})), tmp_path / "home")
    tuned = tuned_of(run)
    assert tuned.base is not None
    write_final(run, tuned.base)
    final = run.final_path
    origin = json.loads((final / "tunesmith.json").read_text())
    exported = json.loads((convert(tuned, tmp_path / "out") / "tunesmith.json").read_text())
    del exported["export"]
    assert origin == exported
    assert str(tmp_path_factory.getbasetemp()) not in (final / "tunesmith.json").read_text()

    # As a process leaves it that is killed between the two renames.
    final.rename(final.with_name(".removed_final_0123abcd"))
    final.with_name(".final_4567cdef").mkdir()
    run.clean()
    assert run.holds_final()
    final.rename(final.with_name(".removed_final_0123abcd"))
    write_final(run, tuned.base)
    assert run.holds_final()
    assert [path.name for path in final.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("changes", [{}, {"lora_target_modules": ["q_proj", "lm_head"]}, {"full_ft": True}])
def test_the_proof_counts_each_written_weight_once_and_is_told_once(
    changes: dict[str, Any], trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = tuned_of(trained("llama", **changes))
    with caplog.at_level(logging.INFO, "tunesmith"):
        exported = export(tuned, ConvertConfig(), tmp_path / "out")
    assert exported.proof is not None
    assert exported.proof.num_weights == sum(t.numel() for t in load_weights(exported.folder).values())
    assert exported.proof.describe() in exported.describe()
    assert exported.proof.describe() not in caplog.text


def test_an_exported_model_can_be_exported_again_in_other_files(trained: Trained, tmp_path: Path) -> None:
    first = convert(tuned_of(trained("mixtral")), tmp_path / "first")
    tuned = find_tuned(ConvertConfig(checkpoints_dir=str(first)))
    assert tuned.kind == "model"
    exported = export(tuned, ConvertConfig(max_shard_size="100KiB", dtype="bfloat16"), tmp_path / "second")
    assert exported.num_files > 1
    weights = load_weights(exported.folder)
    assert all(torch.equal(weights[name], t.bfloat16()) for name, t in load_weights(first).items())


@pytest.mark.parametrize("full_ft", [False, True])
def test_any_step_of_the_run_is_exported_by_its_number_or_its_folder(
    full_ft: bool, trained: Trained, tmp_path: Path
) -> None:
    run = trained("llama", full_ft=True) if full_ft else trained("llama")
    steps = {checkpoint.step: checkpoint.path for checkpoint in run.checkpoints()}
    assert list(steps) == [2, 4]
    ways = {
        "number": {"checkpoints_dir": str(run.path), "checkpoint": 2},
        "digits": {"checkpoints_dir": str(run.path), "checkpoint": "0002"},
        "name": {"checkpoints_dir": str(run.path), "checkpoint": "checkpoint_00000002"},
        "folder": {"checkpoints_dir": f"{steps[2]}/"},
        "both": {"checkpoints_dir": str(steps[2]), "checkpoint": "02"},
        "run name": {"checkpoints_dir": run.run_name, "home": run.home, "checkpoint": "2"},
    }
    found = {name: find_tuned(ConvertConfig(**way)) for name, way in ways.items()}  # type: ignore[arg-type]
    assert {name: tuned.folder for name, tuned in found.items()} == dict.fromkeys(ways, steps[2])
    second, fourth = (
        load_weights(convert(tuned_of(run, str(step)), tmp_path / str(step))) for step in (2, 4)
    )
    assert not torch.equal(
        second["model.layers.0.self_attn.q_proj.weight"], fourth["model.layers.0.self_attn.q_proj.weight"]
    )
    expected = (
        merge_by_peft(Path(run.read_params()["model"]["path"]), steps[2]).state_dict()
        if not full_ft
        else read_weights(steps[2])
    )
    for name, weight in second.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)
