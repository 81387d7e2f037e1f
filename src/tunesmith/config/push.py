"""The settings of an export that goes to the hub; their names are those of transformers' `push_to_hub`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, model_validator

from tunesmith.config.declare import OptionalStr, Settings, parse_none, setting


def _check_repository(value: str | None) -> str | None:
    if value is None:
        return None
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(value)
    except HFValidationError:
        raise ValueError(
            "it must be a name on the hub, as my-model or my-organization/my-model: letters, digits and - _ . alone, "
            "at most 96"
        ) from None
    return value


def _refuse_switch(value: Any) -> Any:
    # In transformers' training arguments it is a switch, and `hub_model_id` the name.
    is_switch = isinstance(value, bool) or str(value).lower() in ("true", "false")
    if is_switch:
        raise ValueError("it is the name of the repository, as my-model or my-organization/my-model")
    return value


class PushSettings(Settings):
    """Where an export goes on the hub."""

    push_to_hub: Annotated[
        OptionalStr,
        AfterValidator(_check_repository),
        BeforeValidator(_refuse_switch),
        BeforeValidator(parse_none),
    ] = setting(
        None,
        "Repository of the hub that gets the finished export, as my-model or my-organization/my-model; made if there "
        "is none. The token is that of HF_TOKEN or of `hf auth login`.",
        group="push",
        scope="run",
    )
    private: bool = setting(
        True,
        "Only you, or your organization, see the repository that push_to_hub makes.",
        group="push",
        scope="run",
    )
    commit_message: OptionalStr = setting(
        None,
        "Message of the commit that push_to_hub makes; unset: which run and step it is.",
        group="push",
        scope="run",
    )

    @model_validator(mode="after")
    def _check_push(self) -> PushSettings:
        given = [name for name in ("private", "commit_message") if name in self.model_fields_set]
        if given and self.push_to_hub is None:
            raise ValueError(
                f"`{given[0]}` is of what is pushed to the hub: give `push_to_hub` too, or leave it out"
            )
        return self
