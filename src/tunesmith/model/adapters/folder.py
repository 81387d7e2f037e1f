"""What lies in a PEFT adapter's folder, and what it means for its base model; read without PEFT."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from tunesmith.errors import ModelError
from tunesmith.model.files.checks import refuse_pointer
from tunesmith.runs.base_model import read_adapter_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_WEIGHT_FILES = (ADAPTER_WEIGHTS, "adapter_model.bin")

Shape = tuple[int, ...]
Settings = Mapping[str, Any]

_PREFIX = "base_model.model."
# Put between a module's name and its tensor's by what PEFT wraps a module in.
_WRAPPERS = (".token_adapter", ".base_layer", ".original_module", ".modules_to_save")

# What `init_lora_weights` does when PEFT loads an adapter (0.21). These leave the base weights as they are:
_KEEPS_WEIGHTS = ("gaussian", "eva", "orthogonal", "mica")
# these take from them what follows from the weights alone, each time the same:
RECOMPUTED = ("pissa", "olora")
# and what these took is recorded nowhere.
_UNREPEATABLE = {
    "pissa_niter": "takes a random decomposition off the base's weights, another one each time that PEFT loads it",
    "corda": "took off the base's weights what followed from sample texts, which it doesn't hold",
    "lora_ga": "took off the base's weights what followed from gradients, which it doesn't hold",
    "loftq": "was trained on the base's weights as they were quantized then",
}
# Features under which the base's own answers need another model than the adapted one, turned off.
_CHANGES_MODEL = (
    "layer_replication",
    "trainable_token_indices",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
    "use_qalora",
    "use_bdlora",
)


# Kinds of LoRA whose sum is another one than the plain kind's; the value that leaves them off.
FOREIGN_FEATURES = {
    "use_qalora": False,
    "layer_replication": None,
    "megatron_config": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "kasa_config": None,
}


def find_adapter_weights(folder: Path) -> Path:
    """Return the file of an adapter's weights; PEFT too takes safetensors first.

    Raises:
        ModelError: there is none, or a pointer of Git's in its place.
    """
    found = next((folder / name for name in ADAPTER_WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise ModelError(f"`{folder}` holds no {ADAPTER_WEIGHTS}", "get the adapter again")
    refuse_pointer(found)
    return found


def read_adapter_shapes(folder: Path) -> dict[str, Shape]:
    """Return the shapes of an adapter's tensors by name, from the head of its file.

    Raises:
        ModelError: there is no such file, or it is torn.
    """
    import torch

    path = find_adapter_weights(folder)
    try:
        if path.suffix == ".bin":
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return {name: tuple(tensor.shape) for name, tensor in content.items()}
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"`{path}` is not a whole safetensors file: {error}", "export it again") from error
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"`{path}` is not a whole file of weights: {reason}", "get it again") from error


def plain_name(name: str) -> str:
    """Return a tensor's name in an adapter's file as the model's own name: without PEFT's wrappers."""
    name = name.removeprefix(_PREFIX)
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def module_name(model: PreTrainedModel, module: nn.Module | None) -> str | None:
    """Return the name of one of the model's modules."""
    return next((name for name, found in model.named_modules() if found is module), None)


def trained_tokens(model: PreTrainedModel, settings: Settings) -> dict[str, tuple[int, ...]]:
    """Return the tokens whose rows an adapter holds, by the name of the module: embeddings, or head."""
    given = settings.get("trainable_token_indices") or {}
    if isinstance(given, Mapping):
        names = [name for name, _ in model.named_modules()]
        # PEFT's own way to find them.
        return {name: tuple(tokens) for key, tokens in given.items() for name in names if name.endswith(key)}
    return {str(module_name(model, model.get_input_embeddings())): tuple(given)}


def count_rows(model: PreTrainedModel, shapes: Mapping[str, Shape], settings: Settings) -> int:
    """Return how many rows the embeddings have under an adapter.

    The model's own number, unless tokens were added or rows cut off before the training.
    """
    embeddings = module_name(model, model.get_input_embeddings())
    head = module_name(model, model.get_output_embeddings())
    own: int = model.get_input_embeddings().weight.shape[0]
    found = set()
    for name, shape in shapes.items():
        module, _, tensor = plain_name(name).rpartition(".")
        if module in (embeddings, head) and tensor == "weight":
            found.add(shape[0])
        elif module == embeddings and tensor == "lora_embedding_A":
            found.add(shape[1])
        elif plain_name(name) == f"{head}.lora_B.weight":
            found.add(shape[0])
    if found:
        return max(found)
    tokens = trained_tokens(model, settings).values()
    return max([own, *(1 + max(indices, default=-1) for indices in tokens)])


def find_lost_rows(model: PreTrainedModel, shapes: Mapping[str, Shape], settings: Settings) -> Iterator[str]:
    """Yield the parameters that were grown, with their module, by rows which the adapter doesn't hold."""
    rows, own = count_rows(model, shapes, settings), model.get_input_embeddings().weight.shape[0]
    if rows <= own:
        return
    whole = {plain_name(name) for name, shape in shapes.items() if shape[:1] == (rows,)}
    shared = {name for name in whole if not is_saved_module(name, settings)}
    for module, tokens in trained_tokens(model, settings).items():
        if set(range(own, rows)) <= set(tokens):
            shared.add(f"{module}.weight")
    for tied, source in model.all_tied_weights_keys.items():
        if shared & {tied, source}:  # either stands for both
            shared |= {tied, source}
    whole |= shared
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        named = () if module is None else module.named_parameters(module_name(model, module) or "")
        yield from (name for name, parameter in named if len(parameter) == own and name not in whole)


def leaves_base(model: PreTrainedModel, folder: Path) -> bool:
    """Return whether `model` is itself again while PEFT has the adapter in `folder` turned off.

    Raises:
        ModelError: the adapter can't be read.
    """
    settings, shapes = read_adapter_config(folder), read_adapter_shapes(folder)
    init = settings.get("init_lora_weights", True)
    if (
        settings.get("peft_type", "LORA") != "LORA"
        or settings.get("bias", "none") != "none"
        or (isinstance(init, str) and init not in _KEEPS_WEIGHTS)
        or any(settings.get(name) for name in _CHANGES_MODEL)
        or count_rows(model, shapes, settings) != model.get_input_embeddings().weight.shape[0]
    ):
        return False
    # What else it holds whole takes the place of the base's own.
    return all(".lora_" in name or is_saved_module(plain_name(name), settings) for name in shapes)


def stands_before_prompt(folder: Path) -> bool:
    """Return whether the adapter in `folder` is a learned beginning of every prompt, instead of changed weights."""
    return bool(read_adapter_config(folder).get("num_virtual_tokens"))


def is_saved_module(parameter: str, settings: Settings) -> bool:
    """Return whether a parameter is of a module that `modules_to_save` names."""
    parts = parameter.split(".")[:-1]
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(path.endswith(name) for path in paths for name in settings.get("modules_to_save") or ())


def check_repeatable(folder: Path) -> None:
    """Refuse an adapter that began by changing its base model in a way which nobody can repeat.

    Raises:
        ModelError: it names that way, and what to do.
    """
    init = read_adapter_config(folder).get("init_lora_weights")
    kind = next((kind for kind in _UNREPEATABLE if isinstance(init, str) and init.startswith(kind)), None)
    if kind is None:
        return
    raise ModelError(
        f"the adapter `{folder}` began with `init_lora_weights` {init}: it {_UNREPEATABLE[kind]}",
        "where it was trained, save it with PEFT's `path_initial_model_for_weight_conversion`, which makes a plain "
        "LoRA of it; or give the base model as the training had changed it with --model_path, and set "
        "`init_lora_weights` in adapter_config.json to true",
    )
