"""Settings from YAML, environment and flags: where they arrive, what wins, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.config import HFDatasetConfig, Settings, TrainConfig, setting
from tunesmith.config.layers import dump_settings, dump_yaml, load_settings, settings_from_dump
from tunesmith.errors import ConfigError

# For every setting: its text in a flag or a variable, its value in YAML, and what the config then holds.
ARRIVALS: dict[str, tuple[str, Any, Any]] = {
    "dataset_name": ("data.jsonl", "data.jsonl", "data.jsonl"),
    "dataset_config": ("subset", "subset", "subset"),
    "split": ("test", "test", "test"),
    "train_split_ratio": ("0.75", 0.75, 0.75),
    "val_test_split_ratio": ("0", 0, 0.0),
    "input_template": (r"Q: {q}\n", "Q: {q}\n", "Q: {q}\n"),
    "output_template": (r"A:\t{a}", "A:\t{a}", "A:\t{a}"),
    "field_mapping": (
        "q=question, a=answer",
        {"q": "question", "a": "answer"},
        {"q": "question", "a": "answer"},
    ),
    "message_keys": ("role=speaker", {"role": "speaker"}, {"role": "speaker"}),
    "role_names": ("assistant=bot", {"assistant": "bot"}, {"assistant": "bot"}),
    "system_prompt": (r"Be\nbrief.", "Be\nbrief.", "Be\nbrief."),
    "train_on": ("user, assistant", ["user", "assistant"], "user,assistant"),
    "train_on_reasoning": ("false", False, False),
    "unrendered": ("count", "count", "count"),
    "name": ("sums-1.0", "sums-1.0", "sums-1.0"),
    "max_rows": ("500", 500, 500),
    "weight": ("0.5", 0.5, 0.5),
    "validation_dataset": ("held.jsonl", "held.jsonl", "held.jsonl"),
    "validation_split": ("dev", "dev", "dev"),
    "test_dataset": ("org/tests", "org/tests", "org/tests"),
    "test_split": ("final", "final", "final"),
    "group_by": ("user", "user", "user"),
    "num_proc": ("3", 3, 3),
    "hf_model_id": ("org/model", "org/model", "org/model"),
    "model_path": ("models/tiny", "models/tiny", Path("models/tiny")),
    "model_revision": ("refs/pr/1", "refs/pr/1", "refs/pr/1"),
    "dataset_revision": ("v1.0", "v1.0", "v1.0"),
    "datasets": (
        '[{"dataset_name": "a"}, {"dataset_name": "b", "split": "test"}]',
        [{"dataset_name": "a"}, {"dataset_name": "b", "split": "test"}],
        [HFDatasetConfig(dataset_name="a"), HFDatasetConfig(dataset_name="b", split="test")],
    ),
    "trust_remote_code": ("true", True, True),
    "dtype": ("float32", "float32", "float32"),
    "attn_implementation": ("eager", "eager", "eager"),
    "torch_compile": ("true", True, True),
    "full_ft": ("yes", True, True),
    "lora_rank": ("4", 4, 4),
    "lora_alpha": ("8.5", 8.5, 8.5),
    "lora_dropout": ("0", 0, 0.0),
    "lora_target_modules": ("q_proj, v_proj", ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    "use_rslora": ("1", True, True),
    "use_dora": ("true", True, True),
    "init_lora_weights": ("pissa_niter_4", "pissa_niter_4", "pissa_niter_4"),
    "new_tokens": (
        "<|im_start|>, <|im_end|>",
        ["<|im_start|>", "<|im_end|>"],
        ["<|im_start|>", "<|im_end|>"],
    ),
    "modules_to_save": ("embed_tokens,lm_head", ["embed_tokens", "lm_head"], ["embed_tokens", "lm_head"]),
    "adapter_path": ("runs/before", "runs/before", Path("runs/before")),
    "merge_adapter": ("true", True, True),
    "chat_template": ("chatml.jinja", "chatml.jinja", "chatml.jinja"),
    "max_seq_length": ("512", 512, 512),
    "long_text": ("truncate", "truncate", "truncate"),
    "long_examples": ("drop", "drop", "drop"),
    "concatenate": ("true", True, True),
    "packing": ("no", False, False),
    "data_dir": ("prepared", "prepared", Path("prepared")),
    "max_steps": ("5", 5, 5),
    "num_train_epochs": ("1.5", 1.5, 1.5),
    "per_device_train_batch_size": ("7", 7, 7),
    "gradient_accumulation_steps": ("3", 3, 3),
    "learning_rate": ("3e-4", 3e-4, 3e-4),
    "min_learning_rate": ("0", 0, 0.0),
    "lr_scheduler_type": ("linear", "linear", "linear"),
    "warmup_ratio": ("0.5", 0.5, 0.5),
    "weight_decay": ("0.1", 0.1, 0.1),
    "max_grad_norm": ("0", 0, 0.0),
    "seed": ("0", 0, 0),
    "per_device_eval_batch_size": ("5", 5, 5),
    "eval_steps": ("0", 0, 0),
    "max_eval_samples": ("0", 0, 0),
    "early_stopping_patience": ("0", 0, 0),
    "early_stopping_threshold": ("0.5", 0.5, 0.5),
    "gradient_checkpointing": ("false", False, False),
    "fsdp": ("full_shard", "full_shard", "full_shard"),
    "cpu_offload": ("true", True, True),
    "num_workers": ("2", 2, 2),
    "use_gpu": ("false", False, False),
    "max_failures": ("0", 0, 0),
    "home": ("/efs/home/release", "/efs/home/release", Path("/efs/home/release")),
    "results_dir": ("out", "out", "out"),
    "run_name": ("first", "first", "first"),
    "save_steps": ("0", 0, 0),
    "save_total_limit": ("1", 1, 1),
    "logging_steps": ("1", 1, 1),
    "profile": ("3", 3, 3),
    "report_to": ("wandb, mlflow", ["wandb", "mlflow"], ["wandb", "mlflow"]),
    "use_wandb": ("true", True, True),
}


def load(
    yaml_text: str | bytes | None = None,
    folder: Path | None = None,
    flags: dict[str, str] | None = None,
    environ: dict[str, str] | None = None,
) -> TrainConfig:
    path = None
    if yaml_text is not None and folder is not None:
        path = folder / "run.yaml"
        path.write_bytes(yaml_text if isinstance(yaml_text, bytes) else yaml_text.encode())
    return load_settings(TrainConfig, path, flags or {}, environ or {})


def refused(*args: Any, **kwargs: Any) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        load(*args, **kwargs)
    assert error.value.hint
    assert "pydantic" not in str(error.value)
    return error.value


def test_the_table_of_arrivals_holds_every_setting_and_no_default() -> None:
    assert set(ARRIVALS) == set(TrainConfig.model_fields)
    defaults = TrainConfig()
    assert [name for name, (_, _, value) in ARRIVALS.items() if value == getattr(defaults, name)] == []


@pytest.mark.parametrize("name", ARRIVALS)
@pytest.mark.parametrize("way", ["flag", "environment", "yaml", "yaml_text", "dashed_yaml", "grouped_yaml"])
def test_every_setting_arrives_by_every_way(name: str, way: str, tmp_path: Path) -> None:
    text, yaml_value, expected = ARRIVALS[name]
    if way == "flag":
        config = load(flags={name: text})
    elif way == "environment":
        config = load(environ={f"TUNESMITH_{name.upper()}": text})
    elif way == "grouped_yaml" and name in HFDatasetConfig.model_fields:
        config = load(yaml.safe_dump({"hf_dataset_config": {name: yaml_value}}), tmp_path)
    else:
        key = name.replace("_", "-") if way == "dashed_yaml" else name
        # In YAML a newline is a newline: only flags and variables write it as backslash-n.
        written = text.replace(r"\n", "\n").replace(r"\t", "\t") if way == "yaml_text" else yaml_value
        config = load(yaml.safe_dump({key: written}), tmp_path)
    value = getattr(config, name)
    assert value == expected
    assert type(value) is type(expected) or isinstance(expected, Path)
    assert config.model_fields_set == {name}


@pytest.mark.parametrize("way", ["python", "yaml", "flag", "environment"])
def test_a_list_of_one_data_set_is_its_settings_by_themselves(way: str, tmp_path: Path) -> None:
    settings = {"dataset_name": "a.jsonl", "split": "test", "field_mapping": {"instruction": "q"}}
    text = json.dumps([settings])
    ways: dict[str, Callable[[], TrainConfig]] = {
        "python": lambda: TrainConfig(datasets=[HFDatasetConfig(**settings)]),
        "yaml": lambda: load(yaml.safe_dump({"datasets": [settings]}), tmp_path),
        "flag": lambda: load(flags={"datasets": text}),
        "environment": lambda: load(environ={"TUNESMITH_DATASETS": text}),
    }
    config, flat = ways[way](), TrainConfig(**settings)
    assert (config, config.model_fields_set) == (flat, flat.model_fields_set)
    assert dump_settings(config) == dump_settings(flat)
    assert config.data_sets == [config]


def test_several_data_sets_read_back_as_they_were_given(tmp_path: Path) -> None:
    config = load(
        "datasets: [{dataset_name: a, split: train}, {dataset_name: b, input_template: '{q}'}]", tmp_path
    )
    dump = dump_settings(config)
    # A default is no choice, whether it is written or not.
    assert dump["datasets"] == [{"dataset_name": "a"}, {"dataset_name": "b", "input_template": "{q}"}]
    again = settings_from_dump(TrainConfig, json.loads(json.dumps(dump)), config.model_fields_set)
    assert again == config
    assert [it.gives_template for it in again.data_sets] == [False, True]
    assert load(dump_yaml(config), tmp_path) == config
    assert dump_settings(TrainConfig())["datasets"] is None


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("datasets: [{dataset_name: a}]", {"split": "b"}, "put split into the elements of datasets"),
        ("datasets: [{dataset_name: a}, {dataset_name: b}]", {"dataset_name": "c"}, "`--dataset_name`"),
        ("{hf_dataset_config: {split: x}, datasets: [{dataset_name: a}]}", {}, "hf_dataset_config.split"),
        ("datasets: [{dataset_nam: a}]", {}, "run.yaml: datasets.0`: unknown setting `dataset_nam`"),
        ("datasets: [{dataset_name: a, train_split_ratio: 3}]", {}, "datasets.0.train_split_ratio` is `3`"),
        (
            "datasets: [{dataset_name: a}, {dataset_name: b, train_split_ratio: 3}]",
            {},
            "a number above 0 and at most 1",
        ),
        (
            "datasets: [{dataset_name: a}, {dataset_name: b, train_split_ratio: true}]",
            {},
            "datasets.1.train_split_ratio` is `true`",
        ),
        ("datasets: [a.jsonl]", {}, "datasets.0` is `a.jsonl`; it must be a mapping"),
        ("datasets: []", {}, "it must be a list of mappings"),
        ("datasets: a.jsonl", {}, "it must be a list of mappings"),
        (
            "datasets: [{dataset_name: a, num_proc: 2}, {dataset_name: b}]",
            {},
            "`num_proc` is of all `datasets` together",
        ),
    ],
)
def test_data_sets_that_cannot_be_are_refused(
    text: str, flags: dict[str, str], message: str, tmp_path: Path
) -> None:
    assert message in refused(text, tmp_path, flags=flags).message


def test_nothing_given_means_the_defaults() -> None:
    config = load()
    assert config == TrainConfig()
    assert config.model_fields_set == set()
    assert config.gives_template is False


def test_flags_win_over_the_environment_and_that_over_yaml_and_that_over_defaults(tmp_path: Path) -> None:
    text = "max_steps: 1\neval_steps: 1\nsave_steps: 1"
    environ = {"TUNESMITH_EVAL_STEPS": "2", "TUNESMITH_SAVE_STEPS": "2"}
    config = load(text, tmp_path, flags={"save_steps": "3"}, environ=environ)
    assert (config.max_steps, config.eval_steps, config.save_steps, config.logging_steps) == (1, 2, 3, 10)
    assert config.model_fields_set == {"max_steps", "eval_steps", "save_steps"}


def test_a_template_given_anywhere_counts_as_given(tmp_path: Path) -> None:
    assert load("hf_dataset_config:\n  input_template: 'Q: {q}'", tmp_path).gives_template
    assert load(environ={"TUNESMITH_HFDC_OUTPUT_TEMPLATE": "{a}"}).gives_template
    # A mapping may name the columns of any format.
    assert not load(environ={"TUNESMITH_HFDC_FIELD_MAPPING": "messages=b"}).gives_template


def test_defaults_of_the_seed_data_set_do_not_follow_to_another() -> None:
    config = load(flags={"dataset_name": "data.jsonl"})
    assert config.dataset_config is None
    assert config.field_mapping == {}


def test_variables_count_in_any_case_and_with_the_prefix_of_the_data_set() -> None:
    environ = {"TUNESMITH_max_steps": "5", "tunesmith_seed": "1", "TUNESMITH_HFDC_SPLIT": "test"}
    config = load(environ=environ)
    assert (config.max_steps, config.seed, config.split) == (5, 1, "test")


def test_an_empty_variable_counts_as_unset() -> None:
    assert load(environ={"TUNESMITH_MAX_STEPS": ""}).model_fields_set == set()


def test_a_misspelt_variable_is_refused_with_the_nearest_name() -> None:
    error = refused(environ={"TUNESMITH_MAX_STEP": "5"})
    assert error.message == "unknown environment variable `TUNESMITH_MAX_STEP`"
    assert error.hint == "did you mean `TUNESMITH_MAX_STEPS`?"


def test_variables_of_others_are_left_alone() -> None:
    environ = {"TUNESMITH_ZZZ": "5", "MAX_STEPS": "5", "TUNESMITH": "5", "TUNESMITH_": "x"}
    assert load(environ=environ) == TrainConfig()


def test_a_variable_of_another_verb_is_left_alone_however_near() -> None:
    class EvalConfig(Settings):
        max_samples: int = setting(1024, "Examples at most.", group="evaluation", scope="run", ge=1)

    environ = {"TUNESMITH_MAX_SAMPLES": "5"}
    assert load(environ=environ).max_eval_samples == 640
    assert load_settings(EvalConfig, None, {}, environ).max_samples == 5
    assert load_settings(EvalConfig, None, {}, {"TUNESMITH_MAX_STEPS": "5"}) == EvalConfig()


def test_two_variables_for_one_setting_are_refused() -> None:
    error = refused(environ={"TUNESMITH_SPLIT": "a", "TUNESMITH_HFDC_SPLIT": "b"})
    assert "`TUNESMITH_HFDC_SPLIT` and `TUNESMITH_SPLIT`" in error.message


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("max_steps", "0", "a whole number of at least 1"),
        ("max_steps", "5.5", "a whole number of at least 1"),
        ("max_steps", "many", "a whole number of at least 1"),
        ("seed", "2147483648", "a whole number of at least 0 and below 2147483648"),
        ("train_split_ratio", "0", "a number above 0 and at most 1"),
        ("learning_rate", "nan", "a number above 0"),
        ("weight_decay", "inf", "a number of at least 0"),
        ("use_wandb", "maybe", "true or false"),
        ("use_gpu", "maybe", "true or false, or auto"),
        ("num_workers", "0", "a whole number of at least 1, or auto"),
        ("dtype", "float16", "one of auto, bfloat16, float32"),
        ("field_mapping", "question", "a mapping, as name=column,… or {name: column}"),
        ("lora_target_modules", '["q_proj"', "names, as a,b or [a, b], or none"),
    ],
)
def test_a_refusal_names_origin_value_and_what_is_allowed(
    name: str, text: str, allowed: str, tmp_path: Path
) -> None:
    wrong = f"is `{text}`; it must be {allowed}"
    variable = f"TUNESMITH_{name.upper()}"
    assert refused(flags={name: text}).message == f"`--{name}` {wrong}"
    assert refused(environ={variable: text}).message == f"`{variable}` {wrong}"
    assert refused(yaml.safe_dump({name: text}), tmp_path).message == f"`{tmp_path}/run.yaml: {name}` {wrong}"


def test_all_bad_settings_are_named_in_one_error(tmp_path: Path) -> None:
    text = "max_steps: 0\nhf_dataset_config:\n  train_split_ratio: 2\n  dataset_name: ''"
    message = refused(text, tmp_path, {"lora_rank": "x"}, {"TUNESMITH_DTYPE": "bfloat1"}).message
    assert message.splitlines()[0] == "5 settings can't be used:"
    assert len(message.splitlines()) == 6
    for part in (
        "run.yaml: max_steps` is `0`;",
        "run.yaml: hf_dataset_config.train_split_ratio` is `2`;",
        "run.yaml: hf_dataset_config.dataset_name` is empty;",
        "`--lora_rank` is `x`;",
        "`TUNESMITH_DTYPE` is `bfloat1`; it must be one of auto, bfloat16, float32 (did you mean `bfloat16`?)",
    ):
        assert part in message


@pytest.mark.parametrize(
    "name", ["max_steps", "learning_rate", "num_workers", "lora_alpha", "num_train_epochs"]
)
def test_true_is_no_number(name: str, tmp_path: Path) -> None:
    assert f"{name}` is `true`" in refused(f"{name}: true", tmp_path).message


@pytest.mark.parametrize("name", ["run_name", "model_revision", "home", "dataset_name"])
def test_a_number_where_text_belongs_is_to_be_quoted(name: str, tmp_path: Path) -> None:
    error = refused(f"{name}: 20261122", tmp_path)
    assert f"{name}` is `20261122`" in error.message
    assert error.hint == "put it in quotes to make it text: '20261122'"
    assert str(getattr(load(f"{name}: '20261122'", tmp_path), name)) == "20261122"


def test_a_setting_without_value_is_called_empty(tmp_path: Path) -> None:
    assert refused("max_steps:", tmp_path).message.endswith(
        "run.yaml: max_steps` is empty; it must be a whole number of at least 1"
    )


def test_a_bad_entry_of_a_mapping_or_list_is_named(tmp_path: Path) -> None:
    message = refused("field_mapping: {q: 5}\nlora_target_modules: [q_proj, [v]]", tmp_path).message
    assert "run.yaml: field_mapping.q` is `5`; it must be text" in message
    assert 'run.yaml: lora_target_modules.1` is `["v"]`; it must be text' in message


def test_settings_at_odds_with_each_other_say_where_they_came_from(tmp_path: Path) -> None:
    message = refused("min_learning_rate: 0.1", tmp_path, {"learning_rate": "0.01"}).message
    assert "min_learning_rate (0.1) is above learning_rate (0.01)" in message
    assert "run.yaml: min_learning_rate`" in message
    assert "`--learning_rate`" in message


def test_a_long_value_is_shortened_and_stays_on_one_line() -> None:
    message = refused(flags={"max_steps": "1\n" * 500}).message
    assert len(message) < 200
    assert "\n" not in message
