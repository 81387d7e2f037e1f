"""Does a tuned model fit a base model? Told from names and shapes alone, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from tunesmith.errors import ModelError
from tunesmith.model.adapters import ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]

_PEFT_PREFIX = "base_model.model."
_LISTED = 3


def check_adapter_fits(model: PreTrainedModel, shapes: Mapping[str, Shape], base: str) -> None:
    """Refuse an adapter whose LoRA matrices don't belong to `model`, which may be on the meta device.

    Args:
        model: the base model.
        shapes: the adapter's tensors, by their names in `adapter_model.safetensors`.
        base: what to call the base model in the error.

    Raises:
        ModelError: it names modules that are absent, or whose shapes differ.
    """
    parameters = model.named_parameters(remove_duplicate=False)
    weights = {name.removesuffix(".weight"): tuple(p.shape) for name, p in parameters}
    problems = []
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
                problems.append(f"`{module}` is absent")
            elif product not in (weights[module], weights[module][::-1]):
                problems.append(f"`{module}` is {_show(weights[module])}, the adapter's {_show(product)}")
    if problems:
        raise _misfit("adapter", base, problems)


def check_state_fits(
    model: PreTrainedModel, shapes: Mapping[str, Shape], base: str, what: str = "checkpoint"
) -> None:
    """Refuse `what` if its weights, by the model's names, are not those of `model`.

    Raises:
        ModelError: it names weights that are absent, or whose shapes differ.
    """
    weights = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    problems = [
        f"`{name}` is {_show(weights[name])}, the {what}'s {_show(shape)}"
        if name in weights
        else f"`{name}` is absent"
        for name, shape in shapes.items()
        if weights.get(name) != shape
    ]
    if problems:
        raise _misfit(what, base, problems)


def read_adapter_shapes(folder: Path) -> dict[str, Shape]:
    """Return the shapes of an adapter's tensors by name, from the head of its file.

    Raises:
        ModelError: the file is torn.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():  # an older PEFT's; its own loading says what doesn't fit
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"`{path}` is not a whole safetensors file: {error}", "export it again") from error


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
