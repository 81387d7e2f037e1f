"""The settings and templates that shape the data, as the page shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.data.formats import RowFormat
from tunesmith.view.visible import escape_unseen, mark_up, shorten_middle

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from transformers import PreTrainedTokenizerFast

_LONGEST_TEMPLATE_CHARS = 60_000
_ALWAYS_LISTED = {"split", "train_split_ratio", "val_test_split_ratio"}
_LEFT_OUT = {"datasets", "dataset_name", "num_proc", "data_dir"}


def list_settings(config: TrainConfig) -> Iterator[list[tuple[str, Markup]]]:
    """Yield the settings that shape the data: a list for each data set, what isn't its default, then what is of all."""
    for settings in config.data_sets:
        yield [("dataset_name", mark_up(settings.dataset_name)), *_list_chosen(settings)]
    own = TrainConfig.model_fields.keys() - HFDatasetConfig.model_fields.keys() - _LEFT_OUT
    of_data = sorted(name for name in own if _group(TrainConfig.model_fields[name]) == "data")
    yield [(name, _value(getattr(config, name))) for name in [*of_data, "seed"]]


def _group(field: FieldInfo) -> Any:
    return field.json_schema_extra["group"] if isinstance(field.json_schema_extra, dict) else None


def _list_chosen(settings: HFDatasetConfig) -> Iterator[tuple[str, Markup]]:
    for name, field in HFDatasetConfig.model_fields.items():
        value = getattr(settings, name)
        is_chosen = name in settings.model_fields_set and value != field.default
        if name not in _LEFT_OUT and (name in _ALWAYS_LISTED or is_chosen):
            yield name, _value(value)


def _value(value: Any) -> Markup:
    text = value if isinstance(value, str) else str(value)
    return mark_up(shorten_middle(text, _LONGEST_TEMPLATE_CHARS))


def list_templates(
    sources: Sequence[tuple[HFDatasetConfig, RowFormat]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[str, Markup]]:
    """Yield what turns the rows into text: the chat template where there are conversations, else what fills in."""
    given = tokenizer.chat_template or {}
    templates = {"": given} if isinstance(given, str) else given
    has_conversations = any(row_format.name == "messages" for _, row_format in sources)
    for name, template in templates.items() if has_conversations else ():
        shown = escape_unseen(shorten_middle(template, _LONGEST_TEMPLATE_CHARS))
        yield f"chat template {escape_unseen(name)}".strip(), escape(shown)
    for settings, row_format in sources:
        if row_format.name == "template":
            yield "input_template", mark_up(settings.input_template)
            yield "output_template", mark_up(settings.output_template)
