"""The settings of a data set, and of several in a list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field

from tunesmith.config.declare import (
    AutoInt,
    DatasetName,
    Mapping,
    MetricName,
    OptionalStr,
    Settings,
    SourceName,
    parse_auto,
    parse_json,
    setting,
)

SEED_DATASET = "cognitivecomputations/dolphin"
SEED_DATASET_CONFIG = "flan1m-alpaca-uncensored"
ALL_ASSISTANT_TURNS, LAST_ASSISTANT_TURN, ALL_TURNS = (
    "all_assistant_turns",
    "last_assistant_turn",
    "all_turns",
)
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# The keys of a message that mean something here.
MESSAGE_KEYS = (
    "role", "content", "tool_calls", "function_call", "tool_call_id", "name", "reasoning_content", "thinking", "weight"
)  # fmt: skip

# The settings that say how a row is read.
READING = frozenset(
    {
        "field_mapping",
        "input_template",
        "output_template",
        "message_keys",
        "role_names",
        "system_prompt",
        "train_on",
        "train_on_reasoning",
        "unrendered",
    }
)

SEED_FIELD_MAPPING = {"instruction": "instruction", "input": "input", "output": "output"}

_SUFFIX = re.compile(r"(?i)\.(jsonl|ndjson|json|csv|tsv|parquet|txt|gz|zst|bz2|xz|zip)$")


Part = Literal["validation", "test"]
PARTS: tuple[Part, ...] = ("validation", "test")


# What a setting of turns takes: one of the words, or roles.
TURNS = f"{ALL_ASSISTANT_TURNS}, {LAST_ASSISTANT_TURN}, {ALL_TURNS}, or roles as user,assistant"
TURNS_PATTERN = "^({0}|{1}|{2}|({3})(,({3}))*)$".format(
    ALL_ASSISTANT_TURNS, LAST_ASSISTANT_TURN, ALL_TURNS, "|".join(ROLES)
)


def _join(value: Any) -> Any:
    names = value.split(",") if isinstance(value, str) else value
    return (
        ",".join(map(str.strip, names))
        if isinstance(names, list) and all(isinstance(it, str) for it in names)
        else value
    )


def check_keys(keys: dict[str, str]) -> dict[str, str]:
    """Refuse keys of `message_keys` that messages don't have."""
    for usual, own in keys.items():
        if usual not in MESSAGE_KEYS:
            swapped = f"; did you mean {own}={usual}?" if own in MESSAGE_KEYS else ""
            raise ValueError(f"`{usual}` isn't a key that messages have: {', '.join(MESSAGE_KEYS)}{swapped}")
    return keys


def check_roles(names: dict[str, str]) -> dict[str, str]:
    """Refuse pairs of `role_names` of which neither is a role."""
    for one, other in names.items():
        if not {one, other} & set(ROLES):
            raise ValueError(f"neither `{one}` nor `{other}` is a role: the roles are {', '.join(ROLES)}")
    return names


class HFDatasetConfig(Settings):
    """Which rows to train on, and how a row becomes text."""

    dataset_name: SourceName = setting(
        SEED_DATASET,
        "Hub id; or a JSONL, JSON, CSV or Parquet file, a folder of them, or a saved data set, at a path or at an "
        "address: s3://, gs://, hf://, of a file https:// too.",
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
    input_template: str = setting(
        "### Instruction:\n{instruction}\n ### Input:\n{input}\n",
        "Text of the prompt, with {placeholders} for columns; not trained.",
        group="data",
        scope="data",
        escapes=True,
    )
    output_template: str = setting(
        "### Response:\n{output}",
        "Text of the completion, with {placeholders} for columns; trained, and the end token after it.",
        group="data",
        scope="data",
        escapes=True,
        min_length=1,
    )
    field_mapping: Mapping = setting(
        lambda data: dict(SEED_FIELD_MAPPING) if data.get("dataset_name") == SEED_DATASET else {},
        "Placeholder, or column of a format (messages, prompt, completion, text, system, tools), → the column that holds "
        'it, as {"instruction": "question"} or messages=dialogue; what is not named is in the column of its own name.',
        group="data",
        scope="data",
    )
    message_keys: Annotated[Mapping, AfterValidator(check_keys)] = setting(
        {},
        "Key of a message → what the rows call it, as role=speaker,content=text; a key that is not named has its own name.",
        group="data",
        scope="data",
    )
    role_names: Annotated[Mapping, AfterValidator(check_roles)] = setting(
        {},
        "Role → what the rows call it, as assistant=bot, or bot=assistant,agent=assistant where several names mean one; "
        "ShareGPT's names are known.",
        group="data",
        scope="data",
    )
    system_prompt: OptionalStr = setting(
        None,
        "System message for conversations without one; unset: none.",
        group="data",
        scope="data",
        escapes=True,
    )
    train_on: Annotated[str, BeforeValidator(_join)] = setting(
        ALL_ASSISTANT_TURNS,
        "What of a conversation is trained: all_assistant_turns; last_assistant_turn; all_turns: every token; or the "
        "turns of some roles, as user,assistant. What a message says of itself (weight, train) comes first.",
        group="data",
        scope="data",
        pattern=TURNS_PATTERN,
    )
    train_on_reasoning: bool = setting(
        True,
        "Train the reasoning of an answer (reasoning_content, thinking or a <think> block) too.",
        group="data",
        scope="data",
    )
    unrendered: Literal["refuse", "count"] = setting(
        "refuse",
        "What to do about a message, a call or a tool that the chat template leaves out: refuse the data set, or train "
        "the rest and count it.",
        group="data",
        scope="run",
    )
    name: MetricName = setting(
        None,
        "What logs, inspect and metrics (eval_NAME_loss) call this data set; unset: the last part of dataset_name.",
        group="data",
        scope="data",
    )
    max_rows: AutoInt = setting(
        None,
        "Rows to take at most: the first after a shuffle by seed, before they are split; auto: all.",
        group="data",
        scope="data",
    )
    weight: float = setting(
        1.0,
        "How often an epoch takes each training example: 0.5 draws half of them, anew each epoch; 2 takes each twice.",
        group="data",
        scope="data",
        gt=0,
        le=1000,
    )
    validation_dataset: DatasetName = setting(
        None,
        "Validation set of one's own, a hub id or a path as dataset_name; no row is then split off for validation.",
        group="data",
        scope="data",
    )
    validation_split: OptionalStr = setting(
        None,
        "Split of validation_dataset, or without one another split of the data set itself, to validate on; unset: "
        "validation, of validation_dataset.",
        group="data",
        scope="data",
    )
    test_dataset: DatasetName = setting(
        None,
        "Test set of one's own, a hub id or a path as dataset_name, for evaluate; no row is then split off for it.",
        group="data",
        scope="data",
    )
    test_split: OptionalStr = setting(
        None,
        "Split of test_dataset, or without one another split of the data set itself, to test on; unset: test, of "
        "test_dataset.",
        group="data",
        scope="data",
    )
    group_by: OptionalStr = setting(
        None,
        "Column, such as a user's or a document's id, of which rows of one value stay on one side of the split.",
        group="data",
        scope="data",
    )
    num_proc: int = setting(
        8, "Processes that tokenize, at most one per core.", group="data", scope="run", ge=1
    )

    @property
    def gives_template(self) -> bool:
        """True if the user chose a template, so that rows must fill it."""
        return bool({"input_template", "output_template"} & self.model_fields_set)

    @property
    def roles_by_name(self) -> dict[str, str]:
        """What the rows call the roles → the roles, from pairs that may be written in either order."""
        return dict((other, one) if one in ROLES else (one, other) for one, other in self.role_names.items())

    @property
    def data_sets(self) -> list[HFDatasetConfig]:
        """The data sets that these settings train on."""
        return [self]

    @property
    def own_sets(self) -> list[OwnSet]:
        """The sets of one's own that stand in place of a part of the split, by their data set's number."""
        return [
            OwnSet(number, part, own)
            for number, settings in enumerate(self.data_sets)
            for part in PARTS
            if (own := settings.own_set(part)) is not None
        ]

    @property
    def sources(self) -> list[HFDatasetConfig]:
        """Everything that rows are read from, by `dataset_id`: the data sets, and then the sets of one's own."""
        return [*self.data_sets, *(own.settings for own in self.own_sets)]

    def own_set(self, part: Part) -> HFDatasetConfig | None:
        """Return the settings of the set that stands in place of a part of the split; None where that is split off."""
        dataset_name, split = getattr(self, f"{part}_dataset"), getattr(self, f"{part}_split")
        if dataset_name is None and split is None:
            return None
        changes: dict[str, Any] = {f"{each}_{what}": None for each in PARTS for what in ("dataset", "split")}
        changes |= {"name": None, "max_rows": None, "weight": 1.0, "group_by": None, "split": split or part}
        if dataset_name is not None:
            changes |= {"dataset_name": dataset_name, "dataset_config": None, "dataset_revision": None}
        return self.model_copy(update=changes)


class OwnSet(NamedTuple):
    """A set in place of the `part` that would be split off the data set of this number; None: off all of them."""

    number: int | None
    part: Part
    settings: HFDatasetConfig


# What can be said of all data sets at once, beside their list: how many processes tokenize, and what is held out.
OF_ALL = frozenset({"num_proc", *(f"{part}_{what}" for part in PARTS for what in ("dataset", "split"))})

DataSets = Annotated[
    Annotated[list[HFDatasetConfig], Field(min_length=1)] | None,
    BeforeValidator(parse_json),
    BeforeValidator(parse_auto),
]


def name_data_sets(data_sets: Sequence[HFDatasetConfig]) -> list[str]:
    """Return what to call each of the data sets: as it was named, else by its file or its place on the hub."""
    given = [settings.name for settings in data_sets]
    names: list[str] = []
    for settings in data_sets:
        name = settings.name or _stem_of(settings.dataset_name)
        taken = {*names, *([] if settings.name else filter(None, given))}
        tries = (name if i == 1 else f"{name}_{i}" for i in range(1, 2 * len(data_sets) + 1))
        names.append(next(it for it in tries if it not in taken))
    return names


def _stem_of(dataset_name: str) -> str:
    stem = re.split(r"[/\\]", dataset_name.rstrip("/\\"))[-1]
    while _SUFFIX.search(stem):
        stem = _SUFFIX.sub("", stem)
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", stem).strip("._-") or "data"


def check_names(data_sets: Sequence[HFDatasetConfig]) -> None:
    """Refuse data sets of one name.

    Raises:
        ValueError: two were given the same.
    """
    given = [settings.name for settings in data_sets if settings.name is not None]
    if twice := [name for name in given if given.count(name) > 1]:
        raise ValueError(f"two of the `datasets` have the name `{twice[0]}`: give each a name of its own")


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
    for number, element in enumerate(elements):
        if "dataset_name" not in element:
            given = ", ".join(element) or "nothing"
            raise ValueError(
                f"`datasets` names no data set in its element {number}: it has {given}, and no dataset_name"
            )
    in_elements = {name for it in elements for name in it}
    alone = [
        name for name in data if name in HFDatasetConfig.model_fields and name not in OF_ALL - in_elements
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
