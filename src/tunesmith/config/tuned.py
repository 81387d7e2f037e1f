"""The settings of `tunesmith evaluate` and `tunesmith convert`: which tuned model, and what to do with it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from tunesmith.config.declare import (
    AutoBool,
    AutoInt,
    DatasetName,
    HubId,
    ModelPlace,
    Names,
    OptionalPath,
    OptionalStr,
    PathOrName,
    Settings,
    setting,
)
from tunesmith.config.push import PushSettings
from tunesmith.config.reading import ReadingConfig
from tunesmith.config.sampling import SamplingConfig
from tunesmith.config.size import Size

METRICS = ("bertscore", "rougeL", "chrf", "exact_match", "numeric_match", "tool_calls")


def _check_metrics(names: list[str] | None) -> list[str] | None:
    for name in names or []:
        if name not in METRICS:
            raise ValueError(f"there is no metric `{name}`; the metrics are {', '.join(METRICS)}")
    return names


def _check_checkpoint(value: str) -> str:
    step = value.removeprefix("checkpoint_")
    if step.isdecimal():
        return str(int(step))
    if value not in ("best", "latest"):
        raise ValueError("it must be best, latest or a step, as 100")
    return value


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class TunedModelConfig(Settings):
    """Which tuned model to take."""

    checkpoints_dir: PathOrName = setting(
        None,
        "Run folder, run name under home, checkpoint, PEFT adapter or Hugging Face folder; "
        "unset: the newest run of base_model under home. The word after the verb means the same.",
        group="model",
        scope="run",
    )
    checkpoint: Annotated[str, AfterValidator(_check_checkpoint), BeforeValidator(_number_as_text)] = setting(
        "best",
        "Checkpoint of the run: best (lowest validation loss), latest, or a step.",
        group="model",
        scope="run",
    )
    base_model: HubId = setting(
        "Qwen/Qwen3-8B",
        "Hugging Face id of the base model, where the run or adapter doesn't record it; also picks the run by model.",
        group="model",
        scope="run",
        min_length=1,
    )
    model_path: ModelPlace = setting(
        None,
        "Folder of the base model, in place of the recorded one: a path, or an address of s3://, gs:// or hf://.",
        group="model",
        scope="run",
    )
    trust_remote_code: bool = setting(
        False, "Run Python code that comes with the model or tokenizer.", group="model", scope="run"
    )
    home: OptionalPath = setting(
        None,
        "Folder in which runs are looked for, and logs written; unset: runs.",
        group="output",
        scope="run",
    )


class EvaluateConfig(ReadingConfig, SamplingConfig, TunedModelConfig):
    """Everything `tunesmith evaluate` can be told."""

    full_ft: AutoBool = setting(
        None,
        "The tuned model is a whole model, not an adapter; auto: as its folder says.",
        group="model",
        scope="run",
    )
    compare: Literal["base", "none"] = setting(
        "base",
        "Evaluate the base model on the same samples, or the tuned one alone.",
        group="model",
        scope="run",
    )
    test_dataset: DatasetName = setting(
        None,
        "Test rows, a hub id or a path of anything that training reads, rendered as the run's rows were, or as the settings "
        "of rows say; unset: the run's own test set. Its older name is test_path.",
        group="data",
        scope="run",
        older_names=("test_path",),
    )
    test_split: OptionalStr = setting(
        None,
        "Split of test_dataset, or without one of the data set that the run was trained on; unset: test, of "
        "test_dataset.",
        group="data",
        scope="run",
    )
    max_samples: int = setting(1024, "Test rows at most, from the first on.", group="data", scope="run", ge=1)
    engine: Literal["auto", "vllm", "transformers"] = setting(
        "auto", "What generates; auto is vLLM where it is installed.", group="generation", scope="run"
    )
    batch_size: int = setting(
        128, "Samples generated at once by a replica.", group="generation", scope="run", ge=1
    )
    seed: int = setting(
        16257, "Seed of the sampling and of the intervals.", group="generation", scope="run", ge=0, lt=2**31
    )
    max_model_len: AutoInt = setting(
        None,
        "Tokens of prompt and answer at most; auto: what the longest needs, within the model's positions.",
        group="generation",
        scope="run",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Compute type; auto is that of the training.", group="generation", scope="run"
    )
    metrics: Annotated[Names, AfterValidator(_check_metrics)] = setting(
        None,
        f"Scores to compute, of {', '.join(METRICS)}; unset: those that apply and can be had.",
        group="scores",
        scope="run",
    )
    bertscore_model: PathOrName = setting(
        None,
        "Encoder for BERTScore, a hub id or a folder; unset: bert-score's own for English, roberta-large.",
        group="scores",
        scope="run",
    )
    tensor_parallel_size: int = setting(
        1, "GPUs that hold one replica of the model together.", group="cluster", scope="run", ge=1
    )
    gpu_memory_utilization: float = setting(
        0.9, "Share of a GPU's memory that vLLM may take.", group="cluster", scope="run", gt=0, le=1
    )
    num_replicas: AutoInt = setting(
        None,
        "Replicas of the model that generate side by side; auto: as many as the GPUs hold, one on CPUs.",
        group="cluster",
        scope="run",
    )


class ConvertConfig(PushSettings, TunedModelConfig):
    """Everything `tunesmith convert` can be told."""

    no_merge: bool = setting(
        False, "Export the LoRA adapter by itself, in PEFT format.", group="export", scope="run"
    )
    output_dir: OptionalPath = setting(
        None,
        "Folder to write; unset: hf_format beside the run's results.",
        group="export",
        scope="run",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto",
        "Type of the written weights; auto is that of the base model's files.",
        group="export",
        scope="run",
    )
    max_shard_size: Size = setting(
        "5GB",
        "Largest weight file, as 5GB, 500MiB or a number of bytes; a larger tensor has a file of its own.",
        group="export",
        scope="run",
    )
    verify: bool = setting(
        True,
        "Prove the export equal to an independent merge before it is put in place.",
        group="export",
        scope="run",
    )
    overwrite: bool = setting(
        False, "Replace what output_dir holds, once the new export is whole.", group="export", scope="run"
    )
