"""New tokens, whole modules, adapters that begin in other ways or from others: trained, kept, gone on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from support.exports import convert, load, tuned_of, write_adapter
from support.gradients import assert_close, gradient_of_step, open_sequences
from support.long import long_but
from support.plain_loss import mean_loss
from support.runs import losses, small_config, start, train_here, train_on_rank
from support.workers import WorkerGroup
from tunesmith.config import TrainConfig
from tunesmith.config.layers import load_settings
from tunesmith.errors import ConfigError, ModelError, RunError
from tunesmith.export.final import write_final
from tunesmith.model.adapters.new_tokens import find_new_tokens, load_run_tokenizer
from tunesmith.model.adapters.prior import find_adapter, with_prior_settings
from tunesmith.model.files.state import read_weights
from tunesmith.model.load import load_model_config
from tunesmith.planning.fitting import make_plan
from tunesmith.planning.memory import Memory, build_planned_model
from tunesmith.planning.workers import Workers
from tunesmith.runs.folder import RunDir
from tunesmith.train.start import check_model, check_resumable

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.slow]

ModelOf = Callable[[str], Path]

FAR: dict[str, Any] = {"max_steps": 4, "input_template": "{instruction}\n", "eval_steps": 2, "lora_alpha": 6}
# The tokens are in every row.
CHAT = {
    "new_tokens": ["<|ask|>", "<|end|>"],
    "input_template": "<|ask|>{instruction}\n",
    "output_template": "{output}<|end|>",
}
TIED, UNTIED = "llama", "qwen3"

KEPT = ("new tokens, untied, sharded", "DoRA", "PiSSA", "going on")
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "new tokens, tied": (TIED, CHAT),
    "new tokens, untied, sharded": (UNTIED, {**CHAT, "fsdp": "full_shard"}),
    "whole embeddings and head": (UNTIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "whole norms": (TIED, {"modules_to_save": ["norm"]}),
    "DoRA": (TIED, {"use_dora": True}),
    "PiSSA": (TIED, {"init_lora_weights": "pissa", "use_rslora": True}),
    "OLoRA": (TIED, {"init_lora_weights": "olora"}),
    "MiCA": (TIED, {"init_lora_weights": "mica"}),
    "going on": (TIED, {"adapter_path": "prior"}),
    "merged, then new tokens and PiSSA": (
        TIED,
        {"adapter_path": "prior", "merge_adapter": True, "init_lora_weights": "pissa_niter_4", **CHAT},
    ),
    "merged, experts too": (
        "mixtral",
        {
            "adapter_path": "prior",
            "merge_adapter": True,
            "lora_target_modules": ["q_proj", "experts.down_proj"],
            "lora_dropout": 0.0,
        },
    ),
}
BEGIN_AS_BASE = ("whole norms", "whole embeddings and head", "DoRA", "PiSSA", "OLoRA", "MiCA")


@pytest.fixture(scope="module")
def prior(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of other modules and another rank than ours, as PEFT writes it."""
    folder = tmp_path_factory.mktemp("prior")
    settings = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}
    return write_adapter(model_of(TIED), folder, **settings).folder


@pytest.fixture(scope="module")
def prior_of_experts(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"r": 2, "target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"]}
    return write_adapter(model_of("mixtral"), tmp_path_factory.mktemp("experts"), **settings).folder


@pytest.fixture(scope="module")
def untrained(
    model_of: ModelOf, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], float]:
    """The validation loss of a base model."""

    @lru_cache
    def untrained(family: str) -> float:
        home = tmp_path_factory.mktemp("untrained")
        return losses(
            train_here(start(settings_for(model_of(family), rows, home, max_steps=1))), "eval_loss"
        )[0]

    return untrained


@pytest.mark.parametrize("way", long_but(KEPT, WAYS))
def test_a_checkpoint_is_the_trained_model_on_the_published_base_and_a_resumed_run_is_the_same(
    way: str,
    model_of: ModelOf,
    prior: Path,
    prior_of_experts: Path,
    untrained: Callable[[str], float],
    rows: Path,
    tmp_path: Path,
) -> None:
    family, changes = WAYS[way]
    if "adapter_path" in changes:
        changes = {**changes, "adapter_path": prior if family == TIED else prior_of_experts}
    config = settings_for(model_of(family), rows, tmp_path, **changes)
    check_model(with_prior_settings(config))
    job = start(config)
    run = train_here(job)
    before, evaluated = losses(run), losses(run, "eval_loss")
    assert evaluated[4] < evaluated[0] - 0.1
    if way in BEGIN_AS_BASE:
        assert evaluated[0] == pytest.approx(untrained(family), rel=0, abs=2e-6)

    folder = run.checkpoint_path(4)
    assert validate(model_of(family), folder, run) == pytest.approx(evaluated[4], rel=0, abs=2e-5)
    written = load_file(folder / "adapter_model.safetensors")
    shutil.rmtree(folder)
    assert train_here(job) == run
    assert losses(run) == before
    again = load_file(folder / "adapter_model.safetensors")
    assert written.keys() == again.keys()
    assert [name for name in written if not torch.equal(written[name], again[name])] == []


def settings_for(base: Path, rows: Path, home: Path, **changes: Any) -> TrainConfig:
    config = small_config(base, rows, home, **{**FAR, **changes})
    if not config.goes_on:
        return config
    taken_over = {"lora_rank", "lora_alpha"}
    return TrainConfig(**config.model_dump(exclude_unset=True, exclude=taken_over))


def validate(base: Path, adapter: Path, run: RunDir) -> float:
    """Return the loss over the run's validation set, by transformers and PEFT alone."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = load(base)
    if len(tokenizer) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = PeftModel.from_pretrained(model, adapter)
    return mean_loss(adapted, tokenizer, Path(run.read_params()["data"]["data_dir"]) / "validation.jsonl")


@pytest.mark.parametrize("family", [TIED, UNTIED])
def test_rows_of_new_tokens_begin_as_the_mean_of_the_old_and_they_alone_are_trained(
    family: str, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(
        model_of(family), rows, tmp_path, **{**FAR, **CHAT, "learning_rate": 1e-12, "min_learning_rate": 0}
    )
    run = train_here(start(config))
    folder, base = run.checkpoint_path(4), load(model_of(family))
    tokens = find_new_tokens(config)
    assert tokens is not None and tokens.ids == (506, 507)
    weights = load_file(folder / "adapter_model.safetensors")
    layers = {
        "embed_tokens": base.get_input_embeddings().weight,
        "lm_head": base.get_output_embeddings().weight,
    }
    found = {name: rows for name, rows in weights.items() if ".lora_" not in name}
    assert len(found) == (1 if family == TIED else 2)
    for name, rows_RD in found.items():
        layer = next(weight for layer, weight in layers.items() if layer in name)
        torch.testing.assert_close(rows_RD, layer.mean(0, keepdim=True).expand(2, -1), rtol=0, atol=1e-6)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert all(ids == [506, 507] for ids in settings["trainable_token_indices"].values())
    # In the tokenizer beside it they are special: one token each, and left out of an answer.
    tokenizer = load_run_tokenizer(config)
    beside = AutoTokenizer.from_pretrained(folder)
    for it in (tokenizer, beside):
        assert it("<|ask|>12<|end|>", add_special_tokens=False)["input_ids"][
            :: len(it("12")["input_ids"]) + 1
        ] == [506, 507]
        assert it.decode([506, 507], skip_special_tokens=True) == ""


@pytest.mark.parametrize("family", [TIED, UNTIED])
def test_trained_rows_have_the_gradients_that_peft_s_own_forward_gives(
    family: str, model_of: ModelOf, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.model.kernels import install
    from tunesmith.train import build

    config = small_config(model_of(family), rows, tmp_path, **{**FAR, **CHAT, "lora_dropout": 0.0})
    sequences = open_sequences(config, packing=True)
    fused = gradient_of_step(config, sequences, [torch.arange(4).numpy()])
    assert any("trainable_tokens_delta" in name for name in fused)
    monkeypatch.setattr(install, "install_token_rows", lambda model: None)
    monkeypatch.setattr(build, "fuses_loss", lambda *_: False)
    assert_close(fused, gradient_of_step(config, sequences, [torch.arange(4).numpy()]))


SHARDED = {
    "tied": (TIED, {**CHAT, "use_dora": True}),
    "untied": (UNTIED, {**CHAT, "init_lora_weights": "pissa", "modules_to_save": ["norm"]}),
}


@pytest.mark.parametrize("way", long_but(["tied"], SHARDED))
def test_two_workers_train_as_one(
    way: str, model_of: ModelOf, rows: Path, tmp_path: Path, two_workers: WorkerGroup
) -> None:
    family, changes = SHARDED[way]
    settings = {**FAR, **changes, "max_steps": 2, "fsdp": "full_shard", "lora_dropout": 0.0}
    both = small_config(model_of(family), rows, tmp_path / "both", **settings, gradient_accumulation_steps=2)
    (run, _) = two_workers.run(train_on_rank, start(both, num_workers=2))
    alone = train_here(start(small_config(model_of(family), rows, tmp_path / "alone", **settings)))
    for key in ("loss", "eval_loss"):
        assert losses(run, key) == pytest.approx(losses(alone, key), rel=1e-4)


def test_a_padded_vocabulary_has_room_for_new_tokens(rows: Path, tmp_path: Path) -> None:
    from support.tiny_models import save_model
    from support.tokenizers import build_tokenizer

    base, tokenizer = tmp_path / "base", build_tokenizer("byte_bpe")
    padded = load(save_model(base, tokenizer))
    padded.resize_token_embeddings(520)
    padded.save_pretrained(base)
    run = train_here(start(small_config(base, rows, tmp_path, **{**FAR, **CHAT})))
    assert len(load(base).get_input_embeddings().weight) == 520
    adapted = PeftModel.from_pretrained(load(base), run.checkpoint_path(4))  # as it is, without a resize
    assert len(adapted.get_base_model().get_input_embeddings().weight) == 520
    assert validate(base, run.checkpoint_path(4), run) == pytest.approx(
        losses(run, "eval_loss")[4], rel=0, abs=2e-5
    )


def test_tokens_that_the_tokenizer_has_are_named_and_passed_over(
    model_of: ModelOf, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tunesmith.model.adapters.new_tokens import tell_known_tokens

    config = small_config(model_of(TIED), rows, tmp_path, new_tokens=["<|endoftext|>", "<|end|>"])
    tell_known_tokens(config)
    assert "has `<|endoftext|>` already" in caplog.text and "<|end|>" not in caplog.text
    tokens = find_new_tokens(config)
    assert tokens is not None and tokens.ids == (506,)


def test_new_tokens_shape_the_prepared_data(model_of: ModelOf, rows: Path, tmp_path: Path) -> None:
    prepared = [
        start(small_config(model_of(TIED), rows, tmp_path, run_name=name, new_tokens=tokens)).prepared_path
        for name, tokens in (("a", None), ("b", ["<|end|>"]), ("c", ["<|end|>"]))
    ]
    assert prepared[0] != prepared[1] == prepared[2]


def test_full_fine_tuning_grows_the_embeddings_and_its_export_holds_them(
    model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of(UNTIED), rows, tmp_path, full_ft=True, **{**FAR, **CHAT})
    run = train_here(start(config))
    best = write_final(run, config.model)
    final = load(run.final_path)
    assert final.config.vocab_size == len(final.get_input_embeddings().weight) == 508
    data = Path(run.read_params()["data"]["data_dir"]) / "validation.jsonl"
    assert mean_loss(final, load_run_tokenizer(config), data) == pytest.approx(
        best.eval_loss, rel=0, abs=2e-5
    )


def test_a_run_with_all_of_it_is_exported_and_proven(
    model_of: ModelOf, prior: Path, rows: Path, tmp_path: Path
) -> None:
    _, changes = WAYS["merged, then new tokens and PiSSA"]
    run = train_here(
        start(settings_for(model_of(TIED), rows, tmp_path, **{**changes, "adapter_path": prior}))
    )
    tuned = tuned_of(run)
    exported = load(convert(tuned, tmp_path / "export", verify=True))
    data = Path(run.read_params()["data"]["data_dir"]) / "validation.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert mean_loss(exported, tokenizer, data) == pytest.approx(tuned.eval_loss, rel=0, abs=2e-5)


def test_an_adapter_s_own_settings_are_taken_over(
    model_of: ModelOf, prior: Path, rows: Path, tmp_path: Path
) -> None:
    config = TrainConfig(model_path=model_of(TIED), dataset_name=str(rows), adapter_path=prior)
    taken = with_prior_settings(config)
    assert (taken.lora_rank, taken.lora_alpha, taken.use_rslora) == (3, 5, True)
    assert taken.lora_target_modules == ["q_proj", "up_proj"]
    assert taken.lora_dropout == 0
    assert with_prior_settings(taken) == taken
    for given in (
        {"lora_rank": 8},
        {"lora_alpha": 1},
        {"use_rslora": False},
        {"lora_target_modules": ["q_proj"]},
    ):
        (name,) = given
        with pytest.raises(ConfigError, match=f"`{name}` is .*, but the adapter") as error:
            with_prior_settings(TrainConfig(model_path=model_of(TIED), adapter_path=prior, **given))
        assert "leave" in str(error.value.hint)
    same = TrainConfig(model_path=model_of(TIED), adapter_path=prior, lora_rank=3, lora_dropout=0.5)
    assert with_prior_settings(same).lora_dropout == 0.5


def test_a_run_goes_on_from_a_run_a_checkpoint_or_final(
    model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of(TIED), rows, tmp_path / "first", **FAR)
    first = train_here(start(config))
    best = write_final(first, config.model)
    assert find_adapter(first.path) == find_adapter(first.home) == find_adapter(best.path) == best.path
    for place in (first.path, first.final_path):
        home = tmp_path / f"from_{place.name}"
        further = settings_for(model_of(TIED), rows, home, max_steps=1, adapter_path=place)
        begun = losses(train_here(start(further)), "eval_loss")[0]
        assert begun == pytest.approx(best.eval_loss, rel=0, abs=1e-6)


def test_a_changed_adapter_is_refused_and_the_run_s_own_copy_stays(
    model_of: ModelOf, prior: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(prior, adapter)
    config = small_config(model_of(TIED), rows, tmp_path, adapter_path=adapter, merge_adapter=True)
    run = start(config).run
    recorded = run.read_params()["adapter"]
    assert recorded["source"] == str(adapter)
    assert (run.prior_path / "adapter_config.json").is_file()
    check_resumable(run, config)
    write_adapter(model_of(TIED), adapter, seed=1, r=3, target_modules=["q_proj", "up_proj"])
    with pytest.raises(RunError, match=r"the adapter .* has changed since this run was started"):
        check_resumable(run, config)


REFUSED = {
    "another model": ("mistral_wide", {}, ModelError, "wasn't made from"),
    "pissa as PEFT saves it": (TIED, {"init_lora_weights": "pissa"}, ModelError, "`init_lora_weights` pissa"),
    "trained biases": (TIED, {"bias": "all"}, ModelError, "it sets `bias`"),
}


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_be_gone_on_with_is_refused_at_once(
    case: str, merges: bool, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    from support.tiny_models import save_model
    from support.tokenizers import build_tokenizer

    family, settings, kind, message = REFUSED[case]
    base = model_of(TIED)
    if family != TIED:
        base = save_model(tmp_path / "wide", build_tokenizer("byte_bpe"), "mistral", hidden_size=48)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **settings).folder
    config = TrainConfig(
        model_path=model_of(TIED), dataset_name=str(rows), adapter_path=adapter, merge_adapter=merges
    )
    with pytest.raises(kind, match=message):
        check_model(with_prior_settings(config))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["norm"]}], ids=str)
def test_what_cannot_be_stacked_is_not_merged_in_memory(
    settings: dict[str, Any], model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(
        model_of(TIED), tmp_path / "adapter", target_modules=["q_proj"], **settings
    ).folder
    config = TrainConfig(model_path=model_of(TIED), adapter_path=adapter, merge_adapter=True)
    with pytest.raises(ModelError, match=r"can't be merged into the base in memory") as error:
        with_prior_settings(config)
    assert "tunesmith convert" in str(error.value.hint)


def test_an_adapter_of_weights_that_another_layer_shares_is_not_merged_in_memory(
    model_of: ModelOf, tmp_path: Path
) -> None:
    adapter = write_adapter(model_of(TIED), tmp_path / "adapter", target_modules=["lm_head"]).folder
    config = TrainConfig(model_path=model_of(TIED), adapter_path=adapter, merge_adapter=True)
    with pytest.raises(ModelError, match=r"it adapts `lm_head`, whose weights are also those of another"):
        check_model(with_prior_settings(config))


def test_bfloat16_begins_as_the_base_and_ends_as_its_checkpoint(
    model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    changes = {"init_lora_weights": "pissa", "dtype": "bfloat16", **CHAT}
    run = train_here(start(settings_for(model_of(UNTIED), rows, tmp_path, **changes)))
    weights = read_weights(run.checkpoint_path(4))
    assert {name for name, it in weights.items() if it.dtype != torch.float32} == {
        name for name in weights if ".offset." in name
    }
    found = validate(model_of(UNTIED), run.checkpoint_path(4), run)
    assert found == pytest.approx(losses(run, "eval_loss")[4], rel=0, abs=0.05)


def test_a_plan_counts_what_is_trained(model_of: ModelOf) -> None:
    def plan(**changes: Any) -> Memory:
        config = TrainConfig(model_path=model_of(UNTIED), max_seq_length=256, lora_rank=4, **changes)
        planned = build_planned_model(config, load_model_config(config.model), torch.float32)
        return make_plan(planned, config, Workers(1, "cpu", "CPU", 1 << 40, None, torch.float32)).memory

    plain = plan()
    rows = plan(new_tokens=["<|ask|>", "<|end|>"])
    # Two rows of embeddings and two of the head, of 32 numbers of 4 bytes.
    assert rows.adapters - plain.adapters == rows.gradients - plain.gradients == 2 * 2 * 32 * 4
    assert rows.logits < 1.05 * plain.logits, "the loss stays fused"
    whole = plan(modules_to_save=["embed_tokens", "lm_head"])
    assert whole.adapters - plain.adapters == 2 * 506 * 32 * 4
    assert whole.optimizer - plain.optimizer == 2 * whole.adapters - 2 * plain.adapters


def test_no_adapter_at_adapter_path_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no adapter_config"):
        with_prior_settings(TrainConfig(adapter_path=tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"full_ft": True, "use_dora": True}, "`use_dora` is for adapters, and `full_ft`"),
        ({"full_ft": True, "modules_to_save": ["norm"]}, "`modules_to_save` is for adapters"),
        ({"full_ft": True, "init_lora_weights": "pissa"}, "`init_lora_weights` is for adapters"),
        ({"full_ft": True, "adapter_path": "a"}, "`adapter_path` is for adapters"),
        ({"merge_adapter": True}, "no adapter to merge"),
        ({"adapter_path": "a", "new_tokens": ["<|a|>"]}, "`new_tokens` is for adapters that begin anew"),
        (
            {"adapter_path": "a", "init_lora_weights": "pissa"},
            "`init_lora_weights` is for adapters that begin",
        ),
        ({"use_dora": True, "init_lora_weights": "olora"}, "`use_dora` counts on whole base weights"),
        ({"use_dora": True, "adapter_path": "a", "merge_adapter": True}, "fits no published model"),
        ({"init_lora_weights": "orthogonal", "lora_rank": 3}, "asks for an even rank"),
        ({"new_tokens": ["<|a|>", "<|a|>"]}, r"`<\|a\|>` is named twice"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        with_prior_settings(TrainConfig(**settings))
    assert error.value.hint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "eva"}, "asks for activations"),
        ({"init_lora_weights": "corda"}, "asks for covariances"),
        ({"init_lora_weights": "lora_ga"}, "asks for gradients"),
        ({"init_lora_weights": "loftq"}, "quantized"),
        ({"init_lora_weights": "pisa"}, "must be one of true, false"),
    ],
)
def test_values_that_cannot_be_had_are_refused_with_the_reason(
    settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(TrainConfig, None, settings, {})


@pytest.mark.parametrize(
    ("names", "message"), [(["embed"], "matches nothing"), (["layers"], "is a list of modules")]
)
def test_modules_to_save_that_match_no_module_are_refused(
    names: list[str], message: str, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of(TIED), rows, tmp_path, modules_to_save=names)
    with pytest.raises(ConfigError, match=message):
        check_model(config)
