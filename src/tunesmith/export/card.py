"""The model card, README.md: what the model was made from, how, and how good it is."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Literal

import yaml

from tunesmith.config import TrainConfig
from tunesmith.data.sources import local_path
from tunesmith.errors import DataError
from tunesmith.export.origin import name_base
from tunesmith.runs.metrics_log import untrained_loss
from tunesmith.runs.tuned import TunedModel
from tunesmith.urls import is_url, name_of

Library = Literal["transformers", "peft"]

# Said elsewhere in the card, or true of one machine alone.
_UNLISTED = {"hf_model_id", "model_path", "dataset_name", "datasets", "trust_remote_code"}
# May be raised on the way, like what concerns the machine; but it bends the learning rate.
_LISTED = {"max_steps"}


def write_card(tuned: TunedModel, library: Library, name: str, folder: Path, rows: int | None = None) -> None:
    """Write `README.md` into `folder`; `name` is what the folder will be called, or its repository on the hub.

    `rows` is how many the embeddings have under an adapter, where the base model's have another number.
    """
    (folder / "README.md").write_text(_format_card(tuned, library, name, rows), encoding="utf-8")


def rename_card(
    tuned: TunedModel, library: Library, names: tuple[str, str], folder: Path, rows: int | None = None
) -> None:
    """Let the card in `folder` name the second of two names in place of the first, if it is as it was written."""
    old, new = (_format_card(tuned, library, name, rows) for name in names)
    path = folder / "README.md"
    if path.is_file() and path.read_text(encoding="utf-8") == old:
        path.write_text(new, encoding="utf-8")


def _format_card(tuned: TunedModel, library: Library, name: str, rows: int | None) -> str:
    use = _USE[library] if rows is None else _USE_RESIZED
    paragraphs = [
        f"---\n{yaml.safe_dump(_front_matter(tuned, library), sort_keys=False)}---",
        f"# {name_base(tuned.base)}, fine-tuned" if tuned.base is not None else f"# {name}",
        _describe_origin(tuned, library),
        *_describe_data(tuned),
        *_describe_losses(tuned),
        *_describe_scores(tuned),
        *_describe_settings(tuned),
        f"## Use\n\n```python\n{use.format(name=name, rows=rows)}```",
    ]
    return "\n\n".join(paragraphs) + "\n"


_USE = {
    "transformers": (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
    ),
    "peft": (
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer, GenerationConfig\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("{name}")\n'
        'model.generation_config = GenerationConfig.from_pretrained("{name}")  # where its answers end\n'
        'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
    ),
}


_USE_RESIZED = (
    "from peft import PeftConfig, PeftModel\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig\n\n"
    'base = PeftConfig.from_pretrained("{name}").base_model_name_or_path\n'
    "model = AutoModelForCausalLM.from_pretrained(base)\n"
    "model.resize_token_embeddings({rows})  # as they were when the adapter was trained\n"
    'model = PeftModel.from_pretrained(model, "{name}")\n'
    'model.generation_config = GenerationConfig.from_pretrained("{name}")  # where its answers end\n'
    'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
)


def _front_matter(tuned: TunedModel, library: str) -> dict[str, Any]:
    content: dict[str, Any] = {}
    # The hub takes its own names there, and refuses others.
    if tuned.base is not None and tuned.base.folder is None:
        content["base_model"] = name_base(tuned.base)
    content |= {"library_name": library, "pipeline_tag": "text-generation"}
    content["tags"] = ["tunesmith", "lora" if tuned.kind == "adapter" else "full-fine-tuning"]
    if tuned.kind == "model":
        content["tags"].pop()
    if on_hub := [name for name, is_on_hub in _name_data_sets(tuned) if is_on_hub]:
        content["datasets"] = on_hub
    return content


def _name_data_sets(tuned: TunedModel) -> list[tuple[str, bool]]:
    """Return the name of each data set of the run, and whether it is the hub's."""
    if tuned.params is None:
        return []
    named = []
    for settings in tuned.dataset.data_sets:
        if is_url(settings.dataset_name):
            named.append((name_of(settings.dataset_name), False))
            continue
        is_on_hub = False
        with contextlib.suppress(DataError):  # a local one that is gone
            is_on_hub = local_path(settings) is None
        named.append((settings.dataset_name if is_on_hub else Path(settings.dataset_name).name, is_on_hub))
    return named


def _describe_origin(tuned: TunedModel, library: str) -> str:
    what = {"adapter": "LoRA fine-tuning", "state": "full fine-tuning", "model": "fine-tuning"}[tuned.kind]
    base = f" of `{name_base(tuned.base)}`" if tuned.base is not None else ""
    form = "; this is the adapter alone" if library == "peft" else ""
    merged = ", merged into its weights" if tuned.kind == "adapter" and library == "transformers" else ""
    step = f", step {tuned.step:,} of the run `{tuned.run.run_name}`" if tuned.run else ""
    return f"A {what}{base}{merged}{form}{step}. Made with tunesmith."


def _describe_data(tuned: TunedModel) -> list[str]:
    names = ", ".join(f"`{name}`" for name, _ in _name_data_sets(tuned))
    return [f"## Data\n\n{names}"] if names else []


def _describe_losses(tuned: TunedModel) -> list[str]:
    if tuned.eval_loss is None:
        return []
    first = untrained_loss(tuned.run) if tuned.run else None
    before = f", {first:.4f} before the training" if first is not None else ""
    return [f"## Loss\n\nValidation loss: {tuned.eval_loss:.4f} nats per token{before}."]


def _describe_scores(tuned: TunedModel) -> list[str]:
    if tuned.run is None:
        return []
    path = tuned.run.evaluation_path(tuned.folder.name) / "scores.json"
    if not path.is_file():
        return []
    scores = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        f"| {metric['label']} | {_interval(metric['base'])} | {_interval(metric['tuned'])} | {_interval(metric['difference'])} |"
        for metric in scores["metrics"].values()
    ]
    table = "\n".join(["| score | base | tuned | difference |", "| --- | --- | --- | --- |", *rows])
    return [
        f"## Scores\n\n{scores['verdict']['text']}\n\n{table}\n\nMeans over {scores['num_samples']:,} "
        f"samples of the test set `{Path(scores['test_set']).name}`, with their 95 % intervals."
    ]


def _interval(record: dict[str, float] | None) -> str:
    return "" if record is None else f"{record['mean']:.4g} ({record['low']:.4g} to {record['high']:.4g})"


def _describe_settings(tuned: TunedModel) -> list[str]:
    if tuned.params is None:
        return []
    settings = tuned.params["settings"]
    rows = [
        f"| `{name}` | `{json.dumps(settings[name], ensure_ascii=False, default=str)}` |"
        for name in tuned.params["given"]
        if name not in _UNLISTED and (name in _LISTED or _shapes_result(name))
    ]
    if not rows:
        return ["## Settings\n\nThose of tunesmith's defaults."]
    table = "\n".join(["| setting | value |", "| --- | --- |", *rows])
    return [f"## Settings\n\nOther than tunesmith's defaults:\n\n{table}"]


def _shapes_result(name: str) -> bool:
    field = TrainConfig.model_fields.get(name)
    extra = field.json_schema_extra if field is not None else None
    return isinstance(extra, dict) and extra.get("scope") != "run"
