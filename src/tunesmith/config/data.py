"""The settings of a data set."""

from __future__ import annotations

from tunesmith.config.declare import Mapping, OptionalStr, Settings, Template, setting

SEED_DATASET = "cognitivecomputations/dolphin"
SEED_DATASET_CONFIG = "flan1m-alpaca-uncensored"
SEED_FIELD_MAPPING = {"instruction": "instruction", "input": "input", "output": "output"}


class HFDatasetConfig(Settings):
    """Which rows to train on, and how a row becomes text."""

    dataset_name: str = setting(
        SEED_DATASET,
        "Hub id, or a local JSONL, JSON, CSV or Parquet file, a folder of them, or a saved data set.",
        group="data",
        scope="data",
        min_length=1,
    )
    dataset_config: OptionalStr = setting(
        lambda data: SEED_DATASET_CONFIG if data.get("dataset_name") == SEED_DATASET else None,
        f"Configuration (subset) of a hub data set; for {SEED_DATASET} {SEED_DATASET_CONFIG}, else none.",
        group="data",
        scope="data",
    )
    dataset_revision: OptionalStr = setting(
        None,
        "Branch, tag or commit of the data set on the hub; unset: its main branch.",
        group="data",
        scope="training",
    )
    split: str = setting("train", "Split of the data set to read.", group="data", scope="data", min_length=1)
    train_split_ratio: float = setting(
        0.9,
        "Share of the rows that trains; 1.0 trains on everything and turns evaluation off.",
        group="data",
        scope="data",
        gt=0,
        le=1,
    )
    val_test_split_ratio: float = setting(
        0.5,
        "Share of the held-out rows kept for the test set; the others are the validation set.",
        group="data",
        scope="data",
        ge=0,
        le=1,
    )
    input_template: Template = setting(
        "### Instruction:\n{instruction}\n ### Input:\n{input}\n",
        "Text of the prompt, with {placeholders} for columns; not trained.",
        group="data",
        scope="data",
    )
    output_template: Template = setting(
        "### Response:\n{output}",
        "Text of the completion, with {placeholders} for columns; trained, and the end token after it.",
        group="data",
        scope="data",
        min_length=1,
    )
    field_mapping: Mapping = setting(
        lambda data: dict(SEED_FIELD_MAPPING) if data.get("dataset_name") == SEED_DATASET else {},
        'Placeholder → column, as {"instruction": "question"} or instruction=question,output=answer; '
        "a placeholder that is not named means the column of its own name.",
        group="data",
        scope="data",
    )
    num_proc: int = setting(
        8, "Processes that tokenize, at most one per core.", group="data", scope="run", ge=1
    )

    @property
    def gives_template(self) -> bool:
        """True if the user chose a template or a field mapping, so that rows must fill it."""
        return bool({"input_template", "output_template", "field_mapping"} & self.model_fields_set)

    @property
    def data_sets(self) -> list[HFDatasetConfig]:
        """The data sets that these settings mean, by `dataset_id`."""
        return [self]
