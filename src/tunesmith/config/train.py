"""The settings of `tunesmith train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_serializer, model_validator

from tunesmith.config.adapter import AdapterSettings
from tunesmith.config.data import (
    PARTS,
    READING,
    DataSets,
    HFDatasetConfig,
    OwnSet,
    Part,
    check_names,
    dump_chosen,
    take_single,
)
from tunesmith.config.declare import (
    RECORDED,
    AutoBool,
    AutoInt,
    FolderName,
    HubId,
    ModelPlace,
    OptionalPath,
    OptionalStr,
    PathOrTemplate,
    RunName,
    Trackers,
    parse_auto,
    setting,
)
from tunesmith.config.model_ref import ModelRef, refer_to
from tunesmith.paths import expand_user


class TrainConfig(AdapterSettings, HFDatasetConfig):
    """Everything `tunesmith train` can be told; each field is a flag, a YAML key and an environment variable."""

    hf_model_id: HubId = setting(
        "Qwen/Qwen3-8B", "Hugging Face model id.", group="model", scope="model", min_length=1
    )
    model_path: ModelPlace = setting(
        None,
        "Folder with the model's weights and tokenizer, in place of the hub: a path, or an address of s3://, gs:// or hf://.",
        group="model",
        scope="model",
    )
    model_revision: OptionalStr = setting(
        None,
        "Branch, tag or commit of the model on the hub; unset: its main branch.",
        group="model",
        scope="training",
    )
    trust_remote_code: bool = setting(
        False, "Run Python code that comes with the model or tokenizer.", group="model", scope="model"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto",
        "Compute type; auto is bfloat16 where the processor or GPU has instructions for it, else float32.",
        group="model",
        scope="model",
    )
    attn_implementation: Literal[
        "auto", "varlen", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"
    ] = setting(
        "auto",
        "Attention backend: varlen, which cuts packed rows into their examples, or one of transformers'; "
        "auto is FlashAttention 2 where it is installed, else varlen where the model allows it, else SDPA, or eager "
        "for what SDPA leaves out.",
        group="model",
        scope="training",
    )

    torch_compile: bool = setting(
        False,
        "Compile the model's blocks at the first step, which takes a C++ compiler and up to minutes; kept in "
        "{home}/compiled for later starts. Blocks that torch can't compile run plainly, with a warning.",
        group="model",
        scope="run",
    )

    datasets: DataSets = setting(
        None,
        "Several data sets, trained on together: a list of mappings such as {dataset_name: rows.jsonl, split: train}, "
        "each with its own templates, shares, name, max_rows and weight, in place of those settings by themselves.",
        group="data",
        scope="data",
    )
    chat_template: PathOrTemplate = setting(
        None,
        "Jinja file, or name among the tokenizer's chat templates, in place of its own; the tuned model keeps it.",
        group="data",
        scope="data",
    )
    max_seq_length: int = setting(
        2048,
        "Longest sequence, in tokens; long_text and long_examples say what becomes of longer ones.",
        group="data",
        scope="data",
        ge=2,
    )
    long_text: Literal["split", "truncate"] = setting(
        "split",
        "Rows of `text` that are longer than max_seq_length: split into windows, or truncated at the right.",
        group="data",
        scope="data",
    )
    long_examples: Literal["truncate", "drop"] = setting(
        "truncate",
        "Other examples that are longer than max_seq_length: truncated at the right, or left out; those whose prompt "
        "alone fills it are left out in any case.",
        group="data",
        scope="data",
    )
    packing: bool = setting(
        True,
        "Put several examples in one sequence; attention never crosses them.",
        group="data",
        scope="data",
    )
    concatenate: bool = setting(
        False,
        "Cut examples where a packed sequence ends, so that none has padding; what is behind a cut doesn't see what is before it.",
        group="data",
        scope="data",
    )
    data_dir: OptionalPath = setting(
        None,
        "Folder for training.jsonl, validation.jsonl and test.jsonl; unset: by fingerprint under {home}/datasets.",
        group="data",
        scope="run",
    )

    max_steps: int = setting(10000, "Optimizer steps at most.", group="training", scope="run", ge=1)
    num_train_epochs: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(parse_auto)] = setting(
        None,
        "Passes over the training set at most; unset: max_steps alone decides.",
        group="training",
        scope="training",
    )
    per_device_train_batch_size: int = setting(
        2, "Sequences in a microbatch.", group="training", scope="data", ge=1
    )
    gradient_accumulation_steps: int = setting(
        4, "Microbatches of one worker in a step.", group="training", scope="data", ge=1
    )
    learning_rate: float = setting(
        5e-5, "Highest learning rate, after warm-up.", group="training", scope="training", gt=0
    )
    min_learning_rate: float = setting(
        1e-6, "Learning rate at the last step.", group="training", scope="training", ge=0
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = setting(
        "cosine",
        "Shape of the way from learning_rate down to min_learning_rate.",
        group="training",
        scope="training",
    )
    warmup_ratio: float = setting(
        0.03, "Share of the steps that warms up; 0 is none.", group="training", scope="training", ge=0, le=1
    )
    weight_decay: float = setting(
        0.01, "AdamW's weight decay; 0 is none.", group="training", scope="training", ge=0
    )
    max_grad_norm: float = setting(
        1.0, "Gradient norm to clip to; 0 never clips.", group="training", scope="training", ge=0
    )
    seed: int = setting(
        16257,
        "Seed of the split, the order, the adapters and the dropout.",
        group="training",
        scope="data",
        ge=0,
        lt=2**31,
    )

    per_device_eval_batch_size: int = setting(
        2, "Sequences in a microbatch of the evaluation.", group="evaluation", scope="run", ge=1
    )
    eval_steps: int = setting(
        100,
        "Steps between evaluations; 0 evaluates before the first step and after the last alone.",
        group="evaluation",
        scope="training",
        ge=0,
    )
    max_eval_samples: int = setting(
        640,
        "Validation examples at most, rounded to whole sequences; 0 takes them all.",
        group="evaluation",
        scope="training",
        ge=0,
    )
    early_stopping_patience: int = setting(
        3,
        "Evaluations without improvement before stopping; 0 never stops.",
        group="evaluation",
        scope="training",
        ge=0,
    )
    early_stopping_threshold: float = setting(
        0.001,
        "Smallest fall of the validation loss that counts as improvement, in nats.",
        group="evaluation",
        scope="training",
        ge=0,
    )

    gradient_checkpointing: AutoBool = setting(
        None,
        "Recompute activations in the backward pass: true: of all blocks; auto: of as few as memory asks for.",
        group="memory",
        scope="run",
    )
    fsdp: Literal["auto", "full_shard", "hybrid_shard", "no_shard"] = setting(
        "auto",
        "Weights on each worker: full_shard: a slice of all; hybrid_shard: of each node's workers every one has a slice; "
        "no_shard (LoRA): the frozen ones whole; auto: whole where they fill at most half of its memory, else "
        "hybrid_shard where the nodes have equally many workers and memory allows it, else full_shard.",
        group="memory",
        scope="run",
    )
    cpu_offload: bool = setting(
        False,
        "Keep weights and optimizer state in host memory between uses (GPUs).",
        group="memory",
        scope="run",
    )

    num_workers: AutoInt = setting(
        None,
        "Training processes; auto: one per GPU of the cluster, or one on CPUs.",
        group="cluster",
        scope="run",
    )
    use_gpu: AutoBool = setting(
        None, "Train on GPUs; auto: if the cluster has any.", group="cluster", scope="run"
    )
    max_failures: int = setting(
        2, "Restarts after a failed worker; 0 is none.", group="cluster", scope="run", ge=0
    )

    home: OptionalPath = setting(
        None, "Folder of everything a run writes; unset: runs/{run_name}.", group="output", scope="run"
    )
    results_dir: FolderName = setting(
        "results", "Folder of the results under home.", group="output", scope="run", min_length=1
    )
    run_name: RunName = setting(
        None,
        "Name of the run; unset: the model's name and a digest of the settings that shape the result.",
        group="output",
        scope="run",
    )
    save_steps: int = setting(
        100,
        "Steps between checkpoints, besides those of the best evaluations and the end; 0: those alone.",
        group="output",
        scope="run",
        ge=0,
    )
    save_total_limit: int = setting(
        2, "Newest checkpoints to keep; the best is kept besides.", group="output", scope="run", ge=1
    )
    logging_steps: int = setting(10, "Steps between lines of metrics.", group="output", scope="run", ge=1)
    profile: int = setting(
        0,
        "Steps, after an attempt's first two, that torch's profiler records into profile/ of the run folder; 0 is none.",
        group="output",
        scope="run",
        ge=0,
    )
    report_to: Trackers = setting(
        ["tensorboard"],
        "Where metrics are logged besides metrics.jsonl: tensorboard, wandb, mlflow, trackio, as a,b; the last three "
        "need the extra of their name (tunesmith[mlflow]); none: nowhere.",
        group="output",
        scope="run",
    )
    use_wandb: bool = setting(False, "Add wandb to report_to.", group="output", scope="run")

    @model_validator(mode="before")
    @classmethod
    def _gather_data_sets(cls, data: Any, info: ValidationInfo) -> Any:
        if isinstance(data, dict) and "hf_dataset_config" in data:
            nested = data["hf_dataset_config"]
            nested = nested.model_dump(exclude_unset=True) if isinstance(nested, HFDatasetConfig) else nested
            if not isinstance(nested, dict):
                raise ValueError("hf_dataset_config must be a mapping of data-set settings")
            data = {**nested, **{k: v for k, v in data.items() if k != "hf_dataset_config"}}
        # What a run has recorded holds every setting, those of a single data set too.
        return take_single(data) if isinstance(data, dict) and info.context != RECORDED else data

    @field_serializer("datasets", when_used="json")
    def _dump_datasets(self, data_sets: list[HFDatasetConfig] | None) -> list[dict[str, Any]] | None:
        return None if data_sets is None else [dump_chosen(settings) for settings in data_sets]

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate ({self.min_learning_rate:g}) is above learning_rate ({self.learning_rate:g})"
            )
        if self.concatenate and not self.packing:
            raise ValueError("concatenate fills packed sequences: set packing true, or concatenate false")
        if self.concatenate and any(it.weight != 1 for it in self.data_sets):
            raise ValueError(
                "concatenate cuts examples once and for all: leave weight at 1, or concatenate false"
            )
        check_names(self.data_sets)
        for part in PARTS:
            if self.datasets and getattr(self, f"{part}_split") and not getattr(self, f"{part}_dataset"):
                raise ValueError(
                    f"`{part}_split` is of one data set: put {part}_split into the elements of datasets, "
                    f"or give {part}_dataset too"
                )
        return self

    @property
    def data_sets(self) -> list[HFDatasetConfig]:
        return [self] if self.datasets is None else self.datasets

    @property
    def own_sets(self) -> list[OwnSet]:
        if self.datasets is None:
            return super().own_sets
        return [
            *super().own_sets,
            *(OwnSet(None, part, own) for part in PARTS if (own := self._common_set(part))),
        ]

    def _common_set(self, part: Part) -> HFDatasetConfig | None:
        """Return the set in place of a part of all data sets; it is read as they agree that rows are, and by its columns."""
        dataset_name, split = getattr(self, f"{part}_dataset"), getattr(self, f"{part}_split")
        if not dataset_name:
            return None
        first, *others = self.data_sets
        shared = {
            name: getattr(first, name)
            for name in READING & first.model_fields_set
            if all(getattr(it, name) == getattr(first, name) for it in others)
        }
        return HFDatasetConfig.as_written(**shared, dataset_name=dataset_name, split=split or part)

    @property
    def model(self) -> ModelRef:
        """The model to train, called by `hf_model_id` when that was given, else by `model_path`."""
        if self.model_path is None:
            return refer_to(self.hf_model_id, self.model_revision, self.trust_remote_code)
        on_hub = ModelRef(self.hf_model_id)
        called = on_hub.name if "hf_model_id" in self.model_fields_set else None
        if isinstance(self.model_path, str):
            return ModelRef(self.model_path, None, self.trust_remote_code, called)
        return ModelRef(expand_user(self.model_path), None, self.trust_remote_code, called)
