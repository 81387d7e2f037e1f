"""How `tunesmith evaluate` reads test rows of one's own: as the run was told to, or as these settings say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from tunesmith.config.data import HFDatasetConfig, check_keys, check_roles
from tunesmith.config.declare import Mapping, OptionalStr, PathOrTemplate, Settings, parse_none, setting

_AS_RUN = "unset: as the run was told, else as training does by default."
# What training calls otherwise than evaluate, where both have it.
_NAMES = {"test_config": "dataset_config"}


class ReadingConfig(Settings):
    """What evaluate can be told of rows that no run has rendered; each means what it means in training."""

    test_config: OptionalStr = setting(
        None,
        "Configuration (subset) of test_dataset, where it has several on the hub.",
        group="data",
        scope="run",
    )
    input_template: OptionalStr = setting(
        None,
        f"Text of the prompt, with {{placeholders}} for columns of test_dataset; {_AS_RUN}",
        group="data",
        scope="run",
        escapes=True,
    )
    output_template: OptionalStr = setting(
        None,
        "Text of the completion, with {placeholders} for columns of test_dataset: what it begins with is asked, the rest "
        f"is the reference; {_AS_RUN}",
        group="data",
        scope="run",
        escapes=True,
    )
    field_mapping: Annotated[Mapping | None, BeforeValidator(parse_none)] = setting(
        None,
        "Placeholder, or column of a format (messages, prompt, completion, text, system, tools), → the column of "
        f"test_dataset that holds it, as instruction=question,output=answer; {_AS_RUN}",
        group="data",
        scope="run",
    )
    message_keys: Annotated[
        Annotated[Mapping, AfterValidator(check_keys)] | None, BeforeValidator(parse_none)
    ] = setting(
        None,
        f"Key of a message → what the rows of test_dataset call it, as role=speaker,content=text; {_AS_RUN}",
        group="data",
        scope="run",
    )
    role_names: Annotated[
        Annotated[Mapping, AfterValidator(check_roles)] | None, BeforeValidator(parse_none)
    ] = setting(
        None,
        f"Role → what the rows of test_dataset call it, as assistant=bot; {_AS_RUN}",
        group="data",
        scope="run",
    )
    system_prompt: OptionalStr = setting(
        None,
        f"System message for conversations of test_dataset without one; {_AS_RUN}",
        group="data",
        scope="run",
        escapes=True,
    )
    chat_template: PathOrTemplate = setting(
        None,
        "Jinja file, or name among the tokenizer's chat templates, in place of its own; unset: the tuned model's.",
        group="data",
        scope="run",
    )
    unrendered: Literal["refuse", "count"] | None = setting(
        None,
        "What to do about a message, a call or a tool that the chat template leaves out: refuse the test rows, or ask "
        f"what comes out; {_AS_RUN}",
        group="data",
        scope="run",
    )

    @property
    def given_reading(self) -> dict[str, Any]:
        """The settings that were given, by the names that a data set has for them."""
        values = {_NAMES.get(name, name): getattr(self, name) for name in ReadingConfig.model_fields}
        return {
            name: value
            for name, value in values.items()
            if value is not None and name in HFDatasetConfig.model_fields
        }
