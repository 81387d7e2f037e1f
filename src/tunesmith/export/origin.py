"""tunesmith.json: what an export says of where it came from; nothing in it is true of one machine alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.atomic_files import write_json
from tunesmith.config import ModelRef
from tunesmith.export.again import EXPORT
from tunesmith.runs.folder import FORMAT_VERSION, ORIGIN_FILE
from tunesmith.runs.tuned import TunedModel

_TEMPLATES = ("input_template", "output_template", "field_mapping")


def write_origin(tuned: TunedModel, folder: Path, export: dict[str, Any] | None = None) -> None:
    """Write `tunesmith.json` into `folder`: run, checkpoint and base model; templates where a run recorded them.

    `export` is how it was exported, as `again.record_of` tells it.
    """
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "run": tuned.run.path.name if tuned.run else None,
        "checkpoint": tuned.folder.name,
        "step": tuned.step,
        "eval_loss": tuned.eval_loss,
        "base": name_base(tuned.base) if tuned.base else None,
    }
    if tuned.params is not None:
        # Of several data sets, those of the first: an export's rows are read in one way.
        templates = {name: getattr(tuned.dataset.data_sets[0], name) for name in _TEMPLATES}
        if (system_prompt := tuned.dataset.data_sets[0].system_prompt) is not None:
            templates["system_prompt"] = system_prompt
        names = tuned.params["data"]["row_format"]
        content["base_fingerprint"] = tuned.params["model"]["fingerprint"]
        content["templates"] = {**templates, "row_format": names if isinstance(names, str) else names[0]}
    if export is not None:
        content[EXPORT] = export
    write_json(folder / ORIGIN_FILE, content)


def name_base(base: ModelRef) -> str:
    """Return the hub's id, or a local folder's name: its path means nothing elsewhere."""
    return base.source.resolve().name if isinstance(base.source, Path) else base.source
