"""Does a tuned model fit a base model? Told from names and shapes alone, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tunesmith.errors import ModelError
from tunesmith.model.adapters.folder import Settings, Shape, count_rows, find_lost_rows, module_name
from tunesmith.model.files.weight_names import find_older_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PEFT_PREFIX = "base_model.model."
_LISTED = 3


def check_adapter_fits(
    model: PreTrainedModel, shapes: Mapping[str, Shape], base: str, settings: Settings | None = None
) -> None:
    """Refuse an adapter whose LoRA matrices don't belong to `model`, which may be on the meta device.

    Embeddings may have other numbers of rows, where tokens were added before the training.

    Args:
        model: the base model.
        shapes: the adapter's tensors, by their names in `adapter_model.safetensors`.
        base: what to call the base model in the error.
        settings: those of `adapter_config.json`.

    Raises:
        ModelError: it names modules that are absent, or whose shapes differ; or it lacks rows that the embeddings
            were grown by.
    """
    if settings and settings.get("layer_replication"):
        return  # it is for another number of layers, which PEFT makes as it loads it
    weights = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes_under(model, shapes, settings or {}).items()
    }
    problems: list[str] = []
    absent: list[str] = []
    for name, shape in shapes.items():
        for first, second in ((".lora_A.", ".lora_B."), (".lora_embedding_A", ".lora_embedding_B")):
            if first not in name:
                continue
            module = name.removeprefix(_PEFT_PREFIX).split(first)[0]
            other = shapes.get(name.replace(first, second), (0,))
            product = (other[0], shape[-1])
            if module.endswith((".experts", ".base_layer")):
                continue  # fused experts, whose matrices are stacked
            if module not in weights:
                absent.append(module)
            elif product not in (weights[module], weights[module][::-1]):
                problems.append(f"`{module}` is {_show(weights[module])}, the adapter's {_show(product)}")
    # Single experts, as PEFT knew them before transformers stacked them, are known by the files' names.
    older = find_older_names(model, [f"{module}.weight" for module in absent]) if absent else set()
    problems += [f"`{module}` is absent" for module in absent if f"{module}.weight" not in older]
    if problems:
        raise _misfit("adapter", base, problems)
    check_rows(model, shapes, settings or {})


def check_rows(model: PreTrainedModel, shapes: Mapping[str, Shape], settings: Settings) -> None:
    """Refuse an adapter that lacks rows which the embeddings were grown by.

    Raises:
        ModelError: it names them.
    """
    if lost := list(find_lost_rows(model, shapes, settings)):
        rows, own = count_rows(model, shapes, settings), model.get_input_embeddings().weight.shape[0]
        raise ModelError(
            f"the adapter was trained on embeddings grown from {own:,} to {rows:,} rows, and lacks the new ones of "
            f"{' and '.join(f'`{name}`' for name in lost)}",
            "where it was trained, save it again with PEFT's `save_embedding_layers=True`",
        )


def shapes_under(model: PreTrainedModel, shapes: Mapping[str, Shape], settings: Settings) -> dict[str, Shape]:
    """Return the shapes of the model's parameters under an adapter: its embeddings may have other rows."""
    rows, own = count_rows(model, shapes, settings), model.get_input_embeddings().weight.shape[0]
    resized = {module_name(model, it) for it in (model.get_input_embeddings(), model.get_output_embeddings())}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = tuple(parameter.shape)
        is_resized = name.rpartition(".")[0] in resized and shape[0] == own
        found[name] = (rows, *shape[1:]) if is_resized else shape
    return found


def check_state_fits(
    model: PreTrainedModel,
    shapes: Mapping[str, Shape],
    base: str,
    what: str = "checkpoint",
    weights: Mapping[str, Shape] | None = None,
) -> None:
    """Refuse `what` if its weights, by the model's names, are not those of `model`, or else of `weights`.

    Embeddings and head may have more rows, where tokens were added before the training.

    Raises:
        ModelError: it names weights that are absent, or whose shapes differ.
    """
    if weights is None:
        is_grown = count_rows(model, shapes, {}) > model.get_input_embeddings().weight.shape[0]
        weights = shapes_under(model, shapes if is_grown else {}, {})
    problems = [
        f"`{name}` is {_show(weights[name])}, the {what}'s {_show(shape)}"
        if name in weights
        else f"`{name}` is absent"
        for name, shape in shapes.items()
        if weights.get(name) != shape
    ]
    if problems:
        raise _misfit(what, base, problems)


def _misfit(what: str, base: str, problems: Iterable[str]) -> ModelError:
    found = list(problems)
    listed = "; ".join(found[:_LISTED])
    more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ModelError(
        f"the {what} wasn't made from `{base}`: {listed}{more}",
        "give the base model that it was trained on with --model_path or --base_model",
    )


def _show(shape: Shape) -> str:
    return "×".join(map(str, shape))
