"""How a setting is declared, and the types that settings share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    model_validator,
)

from tunesmith.paths import (
    LONGEST_NAME_BYTES,
    LONGEST_PATH_BYTES,
    count_bytes,
    expand_variables,
    find_long_name,
)
from tunesmith.urls import check_url, is_url, scheme_of

if TYPE_CHECKING:
    from typing import Self

Scope = Literal["data", "model", "training", "run"]
"""What a setting shapes. `data` and `model` can't change when a run is resumed; `training` names
another run by default; `run` never shapes the result."""


RECORDED = {"recorded": True}
"""Context of a validation: the settings are all those that a run has recorded, not what a person gives."""

AS_WRITTEN = {"as_written": True}
"""Context of a validation: variables in paths stay, because they are those of another machine."""


def setting(
    default: Any,
    help: str,
    *,
    group: str,
    scope: Scope,
    escapes: bool = False,
    older_names: Sequence[str] = (),
    **checks: Any,
) -> Any:
    """Declare one setting; `help` is one sentence with the unit and what the extremes mean.

    One that `escapes` is a text in which flags and variables write a newline as backslash-n. Its `older_names` still
    mean it, wherever it can be given.
    """
    extra: dict[str, JsonValue] = {"group": group, "scope": scope}
    if escapes:
        extra["escapes"] = True
    if older_names:
        extra["older_names"] = [*older_names]
    if callable(default):
        return Field(default_factory=default, description=help, json_schema_extra=extra, **checks)
    return Field(default=default, description=help, json_schema_extra=extra, **checks)


def unescape(text: str) -> str:
    """Return the text with a newline and a tab where backslash-n and backslash-t stand for them, as shells make people write."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _parse_mapping(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        try:
            node = yaml.compose(value, Loader=yaml.SafeLoader)
            keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            # What is there twice is refused as what it is.
            return yaml.safe_load(value) if len(set(keys)) == len(keys) else value
        except yaml.YAMLError:
            return value
    pairs = [pair.partition("=") for pair in value.split(",")]
    mapping = {name.strip(): column.strip() for name, _, column in pairs}
    if len(mapping) < len(pairs) or not all(equals and column.strip() for _, equals, column in pairs):
        return value  # refused as what it is: not a mapping
    return mapping


def _parse_list(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return [part.strip() for part in value.split(",") if part.strip()]


def _none_is_empty(value: Any) -> Any:
    return [] if value == ["none"] else value


def parse_json(value: Any) -> Any:
    """Return what a text of JSON means; what isn't one as it is, to be refused as what it is."""
    try:
        return json.loads(value, object_pairs_hook=_without_repeats) if isinstance(value, str) else value
    except (json.JSONDecodeError, _RepeatedKeyError):
        return value


class _RepeatedKeyError(ValueError):
    """An object of JSON that has a key twice."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _RepeatedKeyError
    return made


def parse_none(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in ("", "none", "null") else value


def _path_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def parse_auto(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in ("", "none", "null", "auto") else value


def _check_path(value: Path | None) -> Path | None:
    if value is None:
        return None
    if (name := find_long_name(value)) is not None:
        raise ValueError(
            f"`{name[:20]}…` in it has {count_bytes(name)} bytes; a name on a disk has {LONGEST_NAME_BYTES} at most"
        )
    if count_bytes(value) > LONGEST_PATH_BYTES:
        raise ValueError(f"it is longer than {LONGEST_PATH_BYTES} bytes")
    return value


def _check_folder_name(value: str) -> str:
    if (size := count_bytes(value)) > LONGEST_NAME_BYTES:
        raise ValueError(f"it has {size} bytes; a folder's name has {LONGEST_NAME_BYTES} at most")
    return value


def _check_run_name(value: str | None) -> str | None:
    longest = LONGEST_NAME_BYTES - len("TorchTrainer_")
    if value is not None and (size := count_bytes(value)) > longest:
        raise ValueError(
            f"it has {size} bytes; as a folder's name, behind TorchTrainer_, it has {longest} at most"
        )
    return value


def _check_place(value: str | None) -> str | None:
    if value is not None and not is_url(value):
        _check_path(Path(value))
    return value


def _expand(value: Any, info: ValidationInfo) -> Any:
    """Return a path with the environment's variables in it, except where it is to be taken as it stands."""
    text = str(value) if isinstance(value, str | Path) else ""
    # A web address may have a dollar in its query.
    if "$" not in text or info.context in (RECORDED, AS_WRITTEN) or scheme_of(text).startswith("http"):
        return value
    expanded = expand_variables(text)
    return Path(expanded) if isinstance(value, Path) else expanded


def _expand_unless_text(value: Any, info: ValidationInfo) -> Any:
    is_template = isinstance(value, str) and ("{%" in value or "{{" in value)
    return value if is_template else _expand(value, info)


def _check_source(value: str) -> str:
    return check_url(value) if is_url(value) else value


def _check_hub_id(value: str) -> str:
    if is_url(value):
        raise ValueError("it is a model's id on the hub; an address is given as model_path")
    return value


def _check_on_disk(value: Any) -> Any:
    if is_url(str(value)):
        raise ValueError("it must be a path on a disk; only data sets and models are read from addresses")
    return value


def _place_model(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, str | Path):
        raise ValueError("it must be a path or an address; put it in quotes to make it text")
    if not is_url(str(value)):
        return Path(value)
    # A Path would make one slash of two.
    if scheme_of(url := check_url(str(value))).startswith("http"):
        raise ValueError(
            f"a model is a folder, which {scheme_of(url)}:// can't list: give s3://, gs:// or hf://"
        )
    return url


Mapping = Annotated[dict[str, str], BeforeValidator(_parse_mapping)]
Names = Annotated[
    Annotated[list[str], Field(min_length=1)] | None,
    BeforeValidator(_parse_list),
    BeforeValidator(parse_auto),
]
Places = Annotated[
    Annotated[list[Annotated[str, BeforeValidator(_expand)]], Field(min_length=1)] | None,
    BeforeValidator(_parse_list),
    BeforeValidator(parse_auto),
]
Trackers = Annotated[list[str], BeforeValidator(_none_is_empty), BeforeValidator(_parse_list)]
AutoBool = Annotated[bool | None, BeforeValidator(parse_auto)]
AutoInt = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(parse_auto)]
OptionalPath = Annotated[
    Path | None,
    AfterValidator(_check_path),
    BeforeValidator(_check_on_disk),
    BeforeValidator(_expand),
    BeforeValidator(parse_none),
]
HubId = Annotated[str, AfterValidator(_check_hub_id), BeforeValidator(_expand)]
SourceName = Annotated[str, AfterValidator(_check_source), BeforeValidator(_expand)]
# A hub id, an address, or a path as text or as a Path.
DatasetName = Annotated[
    Annotated[str, AfterValidator(_check_source)] | None,
    BeforeValidator(_expand),
    BeforeValidator(_path_as_text),
    BeforeValidator(parse_none),
]
ModelPlace = Annotated[
    Path | str | None, BeforeValidator(_place_model), BeforeValidator(_expand), BeforeValidator(parse_none)
]
OptionalStr = Annotated[str | None, BeforeValidator(parse_none)]
# What may be a path or something else: a name, or the text itself.
PathOrName = Annotated[
    str | None, AfterValidator(_check_place), BeforeValidator(_expand), BeforeValidator(parse_none)
]
PathOrTemplate = Annotated[str | None, BeforeValidator(_expand_unless_text), BeforeValidator(parse_none)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
# A part of a metric's name, which every tracker takes.
MetricName = Annotated[Annotated[str, Field(pattern=NAME_PATTERN)] | None, BeforeValidator(parse_none)]
# One folder below another: no slash, no control characters, not hidden and not `..`.
_PLAIN_NAME = Field(pattern=r"^[^/.\x00-\x1f][^/\x00-\x1f]*$")
FolderName = Annotated[str, _PLAIN_NAME, AfterValidator(_check_folder_name)]
RunName = Annotated[
    Annotated[str, _PLAIN_NAME] | None, AfterValidator(_check_run_name), BeforeValidator(parse_none)
]


class Settings(BaseModel):
    """A group of settings that can be read from a YAML file, the environment and flags."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def older_names(cls) -> dict[str, str]:
        """Return the older names of settings, and what each is called now."""
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {
            str(older): name
            for name, extra in extras.items()
            if isinstance(extra, dict) and isinstance(listed := extra.get("older_names"), list)
            for older in listed
        }

    @classmethod
    def as_written(cls, **values: Any) -> Self:
        """Return these settings with their paths as they stand: variables in them have been replaced, or aren't ours."""
        return cls.model_validate(values, context=AS_WRITTEN)

    @model_validator(mode="before")
    @classmethod
    def _rename_older(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for older, name in cls.older_names().items():
            if older in data and name in data:
                raise ValueError(f"`{older}` is the older name of `{name}`: give one of them")
            data = {name if it == older else it: value for it, value in data.items()}
        return data
