"""How a step is divided changes nothing: microbatches, packing, activation checkpointing, workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from support.gradients import assert_close, gradient_of_step, open_sequences
from support.runs import losses, small_config, start, train_here, train_on_rank
from support.tiny_models import FAMILIES, save_model
from support.tokenizers import build_tokenizer
from support.workers import WorkerGroup
from tunesmith.config import TrainConfig
from tunesmith.data.prepare import open_prepared
from tunesmith.model.files.state import read_weights
from tunesmith.model.kernels.install import CPU, GPU
from tunesmith.model.load import attention_of
from tunesmith.parallel.mesh import build_mesh
from tunesmith.runs.folder import RunDir
from tunesmith.train import build

pytestmark = pytest.mark.usefixtures("alone")

ModelOf = Callable[[str], Path]

SIX_STEPS = {
    "max_steps": 6,
    "save_total_limit": 9,
    "gradient_accumulation_steps": 5,
    "per_device_train_batch_size": 1,
}


@pytest.mark.parametrize("full_ft", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_many_microbatches_equal_one_large_batch(
    family: str, full_ft: bool, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of(family), rows, tmp_path, full_ft=full_ft, lora_dropout=0.2)
    sequences = open_sequences(config, packing=False)
    chosen = np.arange(12)
    whole = gradient_of_step(config, sequences, [chosen])
    assert_close(whole, gradient_of_step(config, sequences, np.split(chosen, 6)))
    uneven = [chosen[:1], chosen[1:8], chosen[8:]]
    assert_close(whole, gradient_of_step(config, sequences, uneven))


@pytest.mark.parametrize("changes", [{}, {"fsdp": "full_shard"}, {"full_ft": True}], ids=str)
def test_sequences_train_alike_however_many_are_run_at_once(
    changes: dict[str, Any], model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of("llama"), rows, tmp_path, lora_dropout=0.2, **changes)
    sequences = open_sequences(config, packing=True)
    microbatches = [np.array([0, 1, 2]), np.array([3])]
    expected = gradient_of_step(config, sequences, microbatches, num_sequences=1)
    for num_sequences in (2, 3):
        found = gradient_of_step(config, sequences, microbatches, num_sequences=num_sequences)
        assert_close(found, expected)


@pytest.mark.parametrize("full_ft", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_train_as_padded_ones(
    family: str, full_ft: bool, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of(family), rows, tmp_path, full_ft=full_ft, lora_dropout=0.2)
    check_packed_equals_padded(config)


def test_packed_examples_train_as_padded_ones_with_eager_attention(
    model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    changes = {"lora_dropout": 0.2, "attn_implementation": "eager"}
    check_packed_equals_padded(small_config(model_of("mistral"), rows, tmp_path, **changes))


def test_an_adapted_output_layer_drops_by_token(model_of: ModelOf, rows: Path, tmp_path: Path) -> None:
    # It takes the trained positions alone.
    changes = {"lora_dropout": 0.2, "lora_target_modules": ["v_proj", "lm_head"]}
    check_packed_equals_padded(small_config(model_of("qwen3"), rows, tmp_path, **changes))


@pytest.mark.parametrize("use_dora", [False, True])
def test_layers_of_dropout_drop_by_token(use_dora: bool, rows: Path, tmp_path: Path) -> None:
    """Those of a model, and of adapters that are no plain ones."""
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    shares = {"embd_pdrop": 0.2, "resid_pdrop": 0.2, "attn_pdrop": 0.0}
    tokenizer = build_tokenizer("byte_bpe")
    settings = GPT2Config(vocab_size=len(tokenizer), eos_token_id=0, **shape, **shares)
    GPT2LMHeadModel(settings).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    config = small_config(tmp_path / "gpt2", rows, tmp_path, use_dora=use_dora, lora_dropout=0.2)
    sequences = open_sequences(config, packing=False)
    whole = gradient_of_step(config, sequences, [np.arange(6)], num_sequences=6)
    assert_close(whole, gradient_of_step(config, sequences, [np.arange(6)], num_sequences=2))
    other_step = gradient_of_step(config, sequences, [np.arange(6)], step=2)
    assert abs(float(whole["loss"] - other_step["loss"])) > 1e-3


def test_examples_that_were_cut_train_as_padded_ones(model_of: ModelOf, rows: Path, tmp_path: Path) -> None:
    changes = {"lora_dropout": 0.2, "concatenate": True, "max_seq_length": 64}
    check_packed_equals_padded(small_config(model_of("llama"), rows, tmp_path, **changes))


def check_packed_equals_padded(config: TrainConfig) -> None:
    packed, padded = open_sequences(config, packing=True), open_sequences(config, packing=False)
    packs = [np.array([0, 1]), np.array([2])]
    examples = [np.array(packed.examples(pack)) for pack in packs]
    assert sum(map(len, examples)) > 6
    assert_close(gradient_of_step(config, packed, packs), gradient_of_step(config, padded, examples))


@pytest.mark.parametrize("dropout", [0, 0.2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_ways_train_as_the_plain_ones(
    family: str,
    dropout: float,
    model_of: ModelOf,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small_config(model_of(family), rows, tmp_path, lora_dropout=dropout)
    sequences = open_sequences(config, packing=True)
    microbatches = [np.array([0, 1]), np.array([2])]
    fast = gradient_of_step(config, sequences, microbatches)
    sharded = with_changes(config, fsdp="full_shard")
    assert_close(fast, gradient_of_step(sharded, sequences, microbatches))
    masked = gradient_of_step(with_changes(config, attn_implementation="sdpa"), sequences, microbatches)
    assert_close(fast, masked)
    if not dropout:  # PEFT's own layers are other ones
        monkeypatch.setattr(build, "fuses_loss", lambda *_: False)
        plain = replace(CPU, fuses_adapters=False, fuses_elementwise=False)
        assert_close(fast, gradient_of_step(config, sequences, microbatches, kernels=plain))
        assert_close(fast, gradient_of_step(sharded, sequences, microbatches, kernels=GPU))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_cut_into_their_examples_within_windows_and_beyond(
    family: str, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    for length in (16, 17):
        config = small_config(model_of(family), rows, tmp_path, max_seq_length=length)
        model = build.build_model(config, torch.device("cpu"), build_mesh(0, 1))
        assert build.choose_ways(config, model, torch.device("cpu"))
        assert attention_of(model) == "varlen"


@pytest.mark.parametrize("full_ft", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_nothing(
    family: str, full_ft: bool, rows: Path, tmp_path: Path
) -> None:
    model = save_model(tmp_path / family, build_tokenizer("byte_bpe"), family, attention_dropout=0.2)
    config = small_config(model, rows, tmp_path, full_ft=full_ft, lora_dropout=0.2)
    sequences = open_sequences(config, packing=True)
    microbatches = [np.array([0, 1]), np.array([2, 3])]
    kept, recomputed = (
        gradient_of_step(with_changes(config, gradient_checkpointing=on), sequences, microbatches)
        for on in (False, True)
    )
    assert_close(kept, recomputed)
    other_dropout = gradient_of_step(config, sequences, microbatches, step=2)
    assert abs(float(kept["loss"] - other_dropout["loss"])) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("full_ft", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_workers_train_as_one_with_dropout(
    family: str, full_ft: bool, rows: Path, tmp_path: Path, two_workers: WorkerGroup
) -> None:
    # 54 examples in steps of 4 × 2: the seventh step holds 3 microbatches, so a worker runs an empty one.
    model = save_model(tmp_path / family, build_tokenizer("byte_bpe"), family, attention_dropout=0.2)
    changes = {
        "full_ft": full_ft,
        "lora_dropout": 0.2,
        "packing": False,
        "max_steps": 8,
        "learning_rate": 2e-3,
    }
    one, two = train_on_one_and_two(model, rows, tmp_path, two_workers, **changes)
    assert set(losses(one)) == set(range(1, 9))
    assert_same_course(one, two)
    without_dropout = train_here(
        start(small_config(model, rows, tmp_path / "none", **{**changes, "lora_dropout": 0.0}))
    )
    if not full_ft:
        assert max(abs(losses(one)[step] - loss) for step, loss in losses(without_dropout).items()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("full_ft", [False, True])
def test_two_workers_train_as_one_with_an_odd_number_of_microbatches(
    accumulation: int, full_ft: bool, model_of: ModelOf, rows: Path, tmp_path: Path, two_workers: WorkerGroup
) -> None:
    changes = {"full_ft": full_ft, "gradient_accumulation_steps": accumulation, "learning_rate": 2e-3}
    one, two = train_on_one_and_two(model_of("mixtral"), rows, tmp_path, two_workers, **changes)
    assert two.read_params()["global_batch"]["microbatches"] == accumulation
    assert_same_course(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("full_ft", [False, True])
@pytest.mark.parametrize("first", [1, 2])
def test_a_checkpoint_goes_on_with_another_number_of_workers(
    first: int,
    full_ft: bool,
    family: str,
    model_of: ModelOf,
    rows: Path,
    tmp_path: Path,
    two_workers: WorkerGroup,
) -> None:
    config = small_config(
        model_of(family),
        rows,
        tmp_path / "moved",
        full_ft=full_ft,
        learning_rate=2e-3,
        max_steps=6,
        save_total_limit=9,
    )
    whole = train_here(start(with_changes(config, home=tmp_path / "whole")))
    train_on(first, start(config), two_workers)
    moved = break_off(config, after_step=2)
    train_on(3 - first, start(config), two_workers)
    assert moved.latest_checkpoint().step == 6
    assert_same_course(whole, moved)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("full_ft", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    packing: bool,
    full_ft: bool,
    num_workers: int,
    model_of: ModelOf,
    rows: Path,
    tmp_path: Path,
    two_workers: WorkerGroup,
) -> None:
    changes = {"full_ft": full_ft, "packing": packing, **SIX_STEPS}
    config = small_config(model_of("qwen3"), rows, tmp_path, **changes)
    check_resumed_equals_uninterrupted(config, num_workers, two_workers)


@pytest.mark.slow
@pytest.mark.parametrize("concatenate", [False, True])
def test_a_run_on_parts_of_texts_is_resumed_bit_for_bit(
    concatenate: bool, model_of: ModelOf, tmp_path: Path, two_workers: WorkerGroup
) -> None:
    texts = [{"text": " ".join(f"{i} plus {k}" for k in range(i % 40))} for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    changes = {"concatenate": concatenate, **SIX_STEPS}
    config = small_config(model_of("qwen3"), tmp_path / "texts.jsonl", tmp_path, **changes)
    templates = {"input_template", "output_template", "field_mapping"}
    config = TrainConfig(**config.model_dump(exclude_unset=True, exclude=templates))
    check_resumed_equals_uninterrupted(config, 2, two_workers)
    stats = open_prepared(start(config).prepared_path).stats.train
    assert (stats.split > 0, stats.cut > 0) == (not concatenate, concatenate)


def check_resumed_equals_uninterrupted(
    config: TrainConfig, num_workers: int, two_workers: WorkerGroup
) -> None:
    train_on(num_workers, start(config), two_workers)
    run = break_off(config, after_step=6)
    before, weights_before = losses(run), read_weights(run.checkpoint_path(6))
    for step in (2, 4):
        break_off(config, after_step=step)
        train_on(num_workers, start(config), two_workers)
        assert losses(run) == before
        weights = read_weights(run.checkpoint_path(6))
        assert weights.keys() == weights_before.keys()
        assert [name for name in weights if not torch.equal(weights[name], weights_before[name])] == []


def with_changes(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig(**{**config.model_dump(exclude_unset=True), **changes})


def train_on(num_workers: int, job: Any, two_workers: WorkerGroup) -> RunDir:
    return train_here(job) if num_workers == 1 else two_workers.run(train_on_rank, job)[0]


def train_on_one_and_two(
    model: Path, rows: Path, folder: Path, two_workers: WorkerGroup, **changes: Any
) -> tuple[RunDir, RunDir]:
    """Train the same global batches on one worker and on two."""
    runs = []
    for num_workers in (1, 2):
        job = start(small_config(model, rows, folder / str(num_workers), **changes), num_workers=1)
        runs.append(train_on(num_workers, job, two_workers))
    return runs[0], runs[1]


def break_off(config: TrainConfig, after_step: int) -> RunDir:
    """Forget the checkpoints after `after_step`, as if the run had died before them."""
    run = start(config).run
    for checkpoint in run.checkpoints():
        if checkpoint.step > after_step:
            shutil.rmtree(checkpoint.path)
    assert run.latest_checkpoint().step == after_step
    return run


def assert_same_course(one: RunDir, two: RunDir) -> None:
    """Check that losses are the same to 1e-4, and the last checkpoints' weights nearly."""
    for key in ("loss", "eval_loss", "trained_tokens"):
        assert losses(one, key) == pytest.approx(losses(two, key), rel=0, abs=1e-4), key
    last_one, last_two = one.latest_checkpoint(), two.latest_checkpoint()
    assert last_one.step == last_two.step
    some, other = read_weights(last_one.path), read_weights(last_two.path)
    for name in some:
        assert torch.allclose(some[name], other[name], rtol=0, atol=1e-3), name
    if (last_one.path / "adapter_model.safetensors").exists():
        adapters = [load_file(c.path / "adapter_model.safetensors") for c in (last_one, last_two)]
        assert adapters[0].keys() == adapters[1].keys()
        for name in adapters[0]:
            assert torch.allclose(adapters[0][name], adapters[1][name], rtol=0, atol=1e-3), name
