"""The settings of a data set, and of several in a list."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tunesmith.config.declare import Mapping, OptionalStr, Settings, Template, parse_auto, parse_json, setting

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


DataSets = Annotated[
    Annotated[list[HFDatasetConfig], Field(min_length=1)] | None,
    BeforeValidator(parse_json),
    BeforeValidator(parse_auto),
]


def dump_chosen(settings: HFDatasetConfig) -> dict[str, Any]:
    """Return the settings that were given and aren't the defaults, as JSON can hold them."""
    fields = HFDatasetConfig.model_fields
    chosen = {name for name in settings.model_fields_set if getattr(settings, name) != fields[name].default}
    return settings.model_dump(mode="json", include=chosen)


def take_single(data: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with a list of one data set written as that data set's settings by themselves.

    Raises:
        ValueError: data sets are given in both ways.
    """
    listed = parse_json(parse_auto(data.get("datasets")))
    if not isinstance(listed, list):
        return data
    elements = [it.model_dump(exclude_unset=True) if isinstance(it, HFDatasetConfig) else it for it in listed]
    if not all(isinstance(it, dict) for it in elements):
        return data  # refused as what they are
    in_elements = {name for it in elements for name in it}
    # How many processes tokenize can be said once for all.
    alone = [
        name
        for name in data
        if name in HFDatasetConfig.model_fields and name not in {"num_proc"} - in_elements
    ]
    if alone:
        raise ValueError(
            f"`datasets` and `{alone[0]}` both tell what to train on: "
            f"put {alone[0]} into the elements of datasets, or leave datasets out"
        )
    if len(elements) > 1 and "num_proc" in in_elements:
        raise ValueError("`num_proc` is of all `datasets` together: give it by itself, not in one of them")
    if len(elements) != 1:
        return data
    return {name: value for name, value in data.items() if name != "datasets"} | elements[0]
