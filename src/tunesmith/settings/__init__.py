"""Settings from everywhere they can be given: flags, the environment, a YAML file; and their reference."""

from tunesmith.settings.flags import ParsedFlags, parse_flags
from tunesmith.settings.layers import dump_settings, dump_yaml, load_settings, settings_from_dump
from tunesmith.settings.reference import format_help, format_markdown, json_schema

__all__ = [
    "ParsedFlags",
    "dump_settings",
    "dump_yaml",
    "format_help",
    "format_markdown",
    "json_schema",
    "load_settings",
    "parse_flags",
    "settings_from_dump",
]
