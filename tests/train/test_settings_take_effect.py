"""Every setting changes what the program does: those of model and loop here, the others where the table says."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors import safe_open
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from support.gradients import CPU, open_sequences
from support.paths import TESTS
from support.runs import last_event, losses, small_config, start, train_here
from tunesmith.config import TrainConfig
from tunesmith.parallel.mesh import build_mesh
from tunesmith.runs.folder import RunDir
from tunesmith.train.build import build_model, choose_ways
from tunesmith.train.validation import choose_validation_batches

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.slow]

ModelOf = Callable[[str], Path]
Base = tuple[TrainConfig, RunDir]

HERE = Path(__file__).stem
COURSE = f"{HERE}::test_a_setting_of_the_training_changes_its_course"

TRAINED = "test_what_is_trained::test_a_checkpoint_is_the_trained_model_on_the_published_base_and_a_resumed_run_is_the_same"
EFFECTS = {
    "dataset_name": "test_sources::test_a_file_of_each_kind_gives_its_rows_in_order",
    "dataset_config": "test_hub::test_a_configuration_of_a_hub_data_set_is_read",
    "split": "test_folders::test_another_split_is_never_read_however_it_is_named",
    "train_split_ratio": "test_prepare::test_a_thousand_rows_split_into_the_shares_asked_for",
    "val_test_split_ratio": "test_prepare::test_a_thousand_rows_split_into_the_shares_asked_for",
    "input_template": "test_formats::test_a_template_fills_columns_and_keeps_doubled_braces",
    "output_template": "test_formats::test_a_token_is_trained_exactly_if_it_ends_after_the_prompt",
    "field_mapping": "test_formats::test_a_mapping_to_an_absent_column_is_refused_with_the_columns",
    "message_keys": "test_conversations::test_other_names_are_named_rather_than_rewritten",
    "role_names": "test_conversations::test_other_names_are_named_rather_than_rewritten",
    "system_prompt": "test_conversations::test_the_system_prompt_goes_before_conversations_without_one",
    "train_on": "test_chat::test_train_on_chooses_the_turns",
    "train_on_reasoning": "test_chat::test_reasoning_is_trained_as_inference_sees_it",
    "unrendered": "test_chat::test_what_the_template_leaves_out_is_refused_or_counted",
    "name": "test_mixtures::test_data_sets_are_called_by_their_name_else_by_their_file_or_place",
    "max_rows": "test_mixtures::test_max_rows_come_before_the_split_and_follow_from_the_seed",
    "weight": "test_mixtures::test_without_weights_the_packs_are_those_that_were_prepared",
    "validation_dataset": "test_own_sets::test_a_set_of_one_s_own_stands_in_place_of_its_part_of_the_split",
    "validation_split": "test_own_sets::test_another_split_of_the_same_folder_is_validated_or_tested_on",
    "test_dataset": "test_own_sets::test_a_set_of_one_s_own_stands_in_place_of_its_part_of_the_split",
    "test_split": "test_own_sets::test_another_split_of_the_same_folder_is_validated_or_tested_on",
    "group_by": "test_groups::test_rows_of_a_group_stay_on_one_side",
    "num_proc": "test_prepare::test_several_processes_write_what_one_writes",
    "hf_model_id": "test_hub::test_a_model_of_the_hub_is_loaded_at_its_revision",
    "model_path": f"{HERE}::test_the_model_of_model_path_is_trained",
    "model_revision": "test_hub::test_a_model_of_the_hub_is_loaded_at_its_revision",
    "dataset_revision": "test_hub::test_a_hub_data_set_is_asked_for_at_its_revision",
    "trust_remote_code": "test_hub::test_a_model_s_own_code_runs_only_when_it_is_trusted",
    "dtype": f"{HERE}::test_weights_are_kept_and_used_in_dtype",
    "attn_implementation": f"{HERE}::test_the_attention_backend_is_the_one_asked_for",
    "torch_compile": "test_compilation::test_compiled_blocks_train_as_plain_ones",
    "full_ft": "test_families::test_full_fine_tuning_trains_every_weight_and_final_holds_them",
    "lora_rank": f"{HERE}::test_rank_and_alpha_are_the_adapter_s",
    "lora_alpha": f"{HERE}::test_rank_and_alpha_are_the_adapter_s",
    "lora_dropout": COURSE,
    "lora_target_modules": "test_families::test_lora_trains_and_its_checkpoint_is_the_trained_model",
    "use_rslora": "test_families::test_lora_trains_and_its_checkpoint_is_the_trained_model",
    "use_dora": TRAINED,
    "init_lora_weights": TRAINED,
    "new_tokens": "test_what_is_trained::test_rows_of_new_tokens_begin_as_the_mean_of_the_old_and_they_alone_are_trained",
    "modules_to_save": TRAINED,
    "adapter_path": "test_what_is_trained::test_a_run_goes_on_from_a_run_a_checkpoint_or_final",
    "merge_adapter": TRAINED,
    "chat_template": "test_chat_template::test_a_file_a_name_or_a_text_takes_the_place_of_the_tokenizers",
    "max_seq_length": "test_prepare::test_long_examples_are_cut_at_the_right_or_dropped_and_counted",
    "long_text": "test_long_texts::test_a_long_text_is_split_or_truncated",
    "long_examples": "test_long_texts::test_long_examples_are_truncated_or_dropped",
    "concatenate": "test_long_texts::test_concatenated_packs_are_full_and_every_token_is_trained_once",
    "packing": f"{HERE}::test_packing_puts_several_examples_in_a_sequence",
    "datasets": "test_data_sets::test_each_is_split_and_encoded_as_it_would_be_alone",
    "data_dir": "test_prepare::test_data_dir_takes_the_sets_and_is_found_again",
    "max_steps": f"{HERE}::test_a_run_ends_at_max_steps_or_its_epochs",
    "num_train_epochs": f"{HERE}::test_a_run_ends_at_max_steps_or_its_epochs",
    "per_device_train_batch_size": f"{HERE}::test_a_step_takes_as_many_sequences_as_asked_for",
    "gradient_accumulation_steps": f"{HERE}::test_a_step_takes_as_many_sequences_as_asked_for",
    "learning_rate": COURSE,
    "min_learning_rate": COURSE,
    "lr_scheduler_type": COURSE,
    "warmup_ratio": COURSE,
    "weight_decay": COURSE,
    "max_grad_norm": f"{HERE}::test_gradients_are_clipped_to_max_grad_norm_or_never",
    "seed": COURSE,
    "per_device_eval_batch_size": f"{HERE}::test_an_evaluation_takes_as_many_examples_as_asked_for",
    "eval_steps": f"{HERE}::test_evaluations_come_as_often_as_asked_for",
    "max_eval_samples": f"{HERE}::test_an_evaluation_takes_as_many_examples_as_asked_for",
    "early_stopping_patience": f"{HERE}::test_a_run_without_improvement_stops_by_patience_and_threshold",
    "early_stopping_threshold": f"{HERE}::test_a_run_without_improvement_stops_by_patience_and_threshold",
    "gradient_checkpointing": f"{HERE}::test_activations_are_recomputed_when_asked_for",
    "fsdp": f"{HERE}::test_weights_are_sharded_when_asked_for",
    "cpu_offload": f"{HERE}::test_weights_are_offloaded_when_asked_for",
    "num_workers": "test_cluster::test_workers_get_what_fits",
    "use_gpu": "test_cluster::test_workers_get_what_fits",
    "max_failures": "test_resume_on_ray::test_a_failed_training_shows_its_cause_first",
    "home": f"{HERE}::test_a_run_lies_where_it_was_told_to",
    "results_dir": f"{HERE}::test_a_run_lies_where_it_was_told_to",
    "run_name": f"{HERE}::test_a_run_lies_where_it_was_told_to",
    "save_steps": f"{HERE}::test_checkpoints_come_and_stay_as_asked_for",
    "save_total_limit": f"{HERE}::test_checkpoints_come_and_stay_as_asked_for",
    "logging_steps": f"{HERE}::test_metrics_come_as_often_as_asked_for",
    "profile": "test_profiling::test_the_steps_asked_for_are_in_the_trace_and_cost_no_digit",
    "report_to": "test_trackers::test_a_run_is_logged_where_report_to_says",
    "use_wandb": "test_trackers::test_use_wandb_adds_wandb",
}


def test_every_setting_has_a_test_that_it_takes_effect() -> None:
    assert EFFECTS.keys() == TrainConfig.model_fields.keys()
    for where in set(EFFECTS.values()):
        module, _, name = where.partition("::")
        tree = ast.parse(next(TESTS.rglob(f"{module}.py")).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, where


# The course of a training.


@pytest.fixture(scope="module")
def base(model_of: ModelOf, rows: Path, tmp_path_factory: pytest.TempPathFactory, alone: None) -> Base:
    """A run that the others are held against."""
    config = small_config(model_of("llama"), rows, tmp_path_factory.mktemp("base"), packing=False)
    return config, train_here(start(config))


@pytest.fixture
def train_with(base: Base, tmp_path: Path) -> Callable[..., RunDir]:
    """`train_with(name=value, …)` is a run like the base's but for these settings."""

    def train_with(**changes: Any) -> RunDir:
        settings = {**base[0].model_dump(exclude_unset=True), "home": tmp_path / str(changes), **changes}
        return train_here(start(TrainConfig(**settings)))

    return train_with


CHANGES: dict[str, Any] = {
    "seed": 1,
    "learning_rate": 5e-3,
    "min_learning_rate": 5e-3,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.5,
    "weight_decay": 0.9,
    "max_grad_norm": 1e-9,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 3,
    "lora_rank": 2,
    "lora_alpha": 8,
    "lora_dropout": 0.5,
    "lora_target_modules": ["q_proj"],
    "use_rslora": True,
    "full_ft": True,
    "packing": True,
    "dtype": "bfloat16",
    "max_seq_length": 24,
    "train_split_ratio": 0.5,
    "input_template": "{instruction}? ",
    "output_template": "{output}!",
    "field_mapping": {"instruction": "answer", "output": "question"},
}
UNCHANGED: dict[str, Any] = {
    "per_device_eval_batch_size": 1,
    "eval_steps": 0,
    "max_eval_samples": 1,
    "logging_steps": 4,
    "save_steps": 1,
    "save_total_limit": 1,
    "cpu_offload": True,
    "gradient_checkpointing": True,
    "results_dir": "elsewhere",
    "run_name": "another",
    "num_train_epochs": 9,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_of_the_training_changes_its_course(
    name: str, base: Base, train_with: Callable[..., RunDir]
) -> None:
    before, after = losses(base[1]), losses(train_with(**{name: CHANGES[name]}))
    assert before.keys() == after.keys()
    assert max(abs(before[step] - after[step]) for step in before) > 1e-5


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_setting_of_anything_else_leaves_the_course_as_it_is(
    name: str, base: Base, train_with: Callable[..., RunDir]
) -> None:
    before, after = losses(base[1]), losses(train_with(**{name: UNCHANGED[name]}))
    assert after == {step: before[step] for step in after}
    assert set(after) >= {1, 4}


def test_gradients_are_clipped_to_max_grad_norm_or_never(train_with: Callable[..., RunDir]) -> None:
    never, far_above = train_with(max_grad_norm=0), train_with(max_grad_norm=1e9)
    assert losses(never) == pytest.approx(losses(far_above), rel=0, abs=1e-6)
    # Without decay, AdamW's steps don't feel the gradients' size, but for its epsilon.
    stopped = train_with(max_grad_norm=1e-14, weight_decay=0, train_split_ratio=1.0)
    slow = train_with(learning_rate=1e-12, min_learning_rate=0, train_split_ratio=1.0)
    assert losses(stopped) == pytest.approx(losses(slow), rel=0, abs=1e-4)


def test_rank_and_alpha_are_the_adapter_s(train_with: Callable[..., RunDir]) -> None:
    folder = train_with(lora_rank=3, lora_alpha=7.5).checkpoint_path(4)
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    assert {min(shape) for shape in shapes.values()} == {3}
    adapter = PeftConfig.from_pretrained(folder)
    assert (adapter.r, adapter.lora_alpha) == (3, 7.5)


def test_a_step_takes_as_many_sequences_as_asked_for(train_with: Callable[..., RunDir]) -> None:
    def sequences_per_step(**changes: int) -> float:
        return 54 * losses(train_with(**changes), "epoch")[1]

    assert sequences_per_step(gradient_accumulation_steps=3, per_device_train_batch_size=9) == 27
    assert sequences_per_step(gradient_accumulation_steps=1, per_device_train_batch_size=2) == 2
    assert sequences_per_step(gradient_accumulation_steps=9, per_device_train_batch_size=2) == 18


def test_a_run_ends_at_max_steps_or_its_epochs(train_with: Callable[..., RunDir]) -> None:
    assert max(losses(train_with(max_steps=2))) == 2
    assert max(losses(train_with(max_steps=99, num_train_epochs=1))) == 7
    assert max(losses(train_with(max_steps=99, num_train_epochs=0.5))) == 4
    short = train_with(max_steps=3, num_train_epochs=9)
    assert (max(losses(short)), last_event(short, "finished")["message"]) == (3, "step 3 of 3")


def test_packing_puts_several_examples_in_a_sequence(base: Base, train_with: Callable[..., RunDir]) -> None:
    packed = train_with(packing=True)
    assert packed.read_params()["packing"] is True
    assert base[1].read_params()["packing"] is False
    assert losses(packed, "tokens")[1] > 2 * losses(base[1], "tokens")[1]


# Evaluation, metrics, checkpoints.


def test_evaluations_come_as_often_as_asked_for(train_with: Callable[..., RunDir]) -> None:
    assert set(losses(train_with(eval_steps=3), "eval_loss")) == {0, 3, 4}
    assert losses(train_with(train_split_ratio=1.0), "eval_loss") == {}


def test_an_evaluation_takes_as_many_examples_as_asked_for(
    base: Base, train_with: Callable[..., RunDir]
) -> None:
    held_out = open_sequences(base[0], packing=False)

    def sizes(device_type: str, **changes: int) -> list[int]:
        config = base[0].model_copy(update={"max_seq_length": 100, **changes})
        return [len(batch) for batch in choose_validation_batches(held_out, config, device_type)]

    assert sizes("cpu", max_eval_samples=7, per_device_eval_batch_size=3) == [3, 3, 1]
    assert sizes("cpu", max_eval_samples=0, per_device_eval_batch_size=20) == [10, 10, 10, 10, 10, 4]
    assert sizes("cuda", max_eval_samples=0, per_device_eval_batch_size=20) == [20, 20, 14]
    assert sizes("cuda", max_eval_samples=640, per_device_eval_batch_size=54) == [54]
    one, all_of_them = train_with(max_eval_samples=1), train_with(max_eval_samples=0)
    assert losses(one, "eval_loss")[0] != losses(all_of_them, "eval_loss")[0]
    assert losses(all_of_them, "eval_loss") == losses(base[1], "eval_loss")


def test_a_run_without_improvement_stops_by_patience_and_threshold(train_with: Callable[..., RunDir]) -> None:
    def stops_at(**changes: float) -> int:
        run = train_with(eval_steps=1, max_steps=6, **changes)
        assert ("early" in last_event(run, "finished")["message"]) == (max(losses(run)) < 6)
        return max(losses(run))

    # No fall is large enough; the first evaluation of the training is the one that counts from.
    assert stops_at(early_stopping_threshold=100, early_stopping_patience=1) == 2
    assert stops_at(early_stopping_threshold=100, early_stopping_patience=3) == 4
    assert stops_at(early_stopping_threshold=0, early_stopping_patience=1) == 6


def test_metrics_come_as_often_as_asked_for(train_with: Callable[..., RunDir]) -> None:
    assert set(losses(train_with(logging_steps=3, max_steps=7))) == {1, 3, 6, 7}


def test_checkpoints_come_and_stay_as_asked_for(train_with: Callable[..., RunDir]) -> None:
    for limit, steps in ((9, [3, 6, 7]), (2, [6, 7])):
        run = train_with(train_split_ratio=1.0, max_steps=7, save_steps=3, save_total_limit=limit)
        assert [checkpoint.step for checkpoint in run.checkpoints()] == steps


def test_a_run_lies_where_it_was_told_to(base: Base, tmp_path: Path) -> None:
    settings = base[0].model_dump(exclude_unset=True)
    changes = {"home": tmp_path / "h", "results_dir": "r", "run_name": "n", "max_steps": 1}
    run = train_here(start(TrainConfig(**{**settings, **changes})))
    assert run.path == tmp_path / "h" / "r" / "llama" / "ray_results" / "TorchTrainer_n"
    assert run.latest_checkpoint() is not None
    assert {path.name for path in (tmp_path / "h").iterdir()} == {"datasets", "r", "tensorboard_logs"}


# How the model is built.


def test_the_model_of_model_path_is_trained(
    base: Base, model_of: ModelOf, train_with: Callable[..., RunDir]
) -> None:
    run = train_with(model_path=model_of("qwen3"))
    assert run.model_name == "qwen3"
    assert PeftConfig.from_pretrained(run.checkpoint_path(4)).base_model_name_or_path == str(
        model_of("qwen3")
    )
    assert losses(run) != losses(base[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_kept_and_used_in_dtype(dtype: str, base: Base) -> None:
    model = build_model(base[0].model_copy(update={"dtype": dtype}), CPU, build_mesh(0, 1))
    wanted = getattr(torch, dtype)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {wanted}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(input_ids=torch.arange(8).unsqueeze(0)).logits.dtype == wanted


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen"])
def test_the_attention_backend_is_the_one_asked_for(
    name: str, base: Base, train_with: Callable[..., RunDir]
) -> None:
    model = build_model(base[0].model_copy(update={"attn_implementation": name}), CPU, build_mesh(0, 1))
    choose_ways(base[0].model_copy(update={"attn_implementation": name}), model, CPU)
    assert model.config._attn_implementation == name
    run = train_with(attn_implementation=name, max_steps=1)
    assert f"attention {name}" in last_event(run, "start")["message"]


def test_activations_are_recomputed_when_asked_for(base: Base, train_with: Callable[..., RunDir]) -> None:
    for asked, is_on in ((True, True), (False, False), (None, False)):
        model = build_model(
            base[0].model_copy(update={"gradient_checkpointing": asked}), CPU, build_mesh(0, 1)
        )
        assert model.is_gradient_checkpointing == is_on
        num_calls = 0

        def count(*_: object) -> None:
            nonlocal num_calls
            num_calls += 1

        attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
        attention.register_forward_pre_hook(count)
        model(input_ids=torch.arange(8).unsqueeze(0), use_cache=False).logits.sum().backward()
        assert num_calls == (2 if is_on else 1)
    message = last_event(train_with(gradient_checkpointing=True, max_steps=1), "start")["message"]
    assert "gradient checkpointing on" in message


@pytest.mark.parametrize(
    ("asked", "is_sharded"),
    [("auto", False), ("no_shard", False), ("full_shard", True), ("hybrid_shard", True)],
)
def test_weights_are_sharded_when_asked_for(
    asked: str, is_sharded: bool, base: Base, train_with: Callable[..., RunDir]
) -> None:
    run = train_with(fsdp=asked)
    placed = "sharded" if is_sharded else "whole on each worker"
    assert f"weights {placed}" in last_event(run, "start")["message"]
    assert losses(run) == pytest.approx(losses(base[1]), rel=1e-5)


@pytest.mark.parametrize("asked", [True, False])
def test_weights_are_offloaded_when_asked_for(asked: bool, base: Base) -> None:
    model = build_model(
        base[0].model_copy(update={"cpu_offload": asked, "fsdp": "full_shard"}), CPU, build_mesh(0, 1)
    )
    groups = [
        group
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in [module._get_fsdp_state()._fsdp_param_group]
    ]
    assert len(groups) == 3  # two blocks and the rest
    assert {isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups} == {asked}
