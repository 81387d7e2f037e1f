"""LoRA adapters, through PEFT. The only import of peft."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.adapter_files import (
    ADAPTER_WEIGHTS,
    check_repeatable,
    count_rows,
    read_adapter_shapes,
)
from tunesmith.model.frozen_weights import ROUTERS, FrozenLinear
from tunesmith.runs.base_model import read_adapter_config
from tunesmith.runs.folder import ADAPTER_CONFIG

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

_ADAPTER_NAME = "default"
# Of PEFT, about what is meant and seen to: what shares weights, and biases that turning an adapter off leaves on.
_EXPECTED_WARNINGS = (
    ".*tie_word_embeddings.*|fan_in_fan_out is set to False.*|.*ensure_weight_tying.*|.*lora_bias.*"
)


def choose_targets(model: PreTrainedModel, config: TrainConfig) -> tuple[list[str], list[str]]:
    """Return the modules to adapt and the fused expert parameters to adapt, both by name.

    By default every linear layer of the blocks: not the head, nor routers. A short name is used where
    it means just the chosen modules, as adapter files have it; else the full one.

    Raises:
        ConfigError: a named module matches nothing, or experts are named while dropout is on.
    """
    layers = (nn.Linear, Conv1D)
    named = [name for name, module in model.named_modules() if isinstance(module, (*layers, nn.Embedding))]
    fused = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    if config.lora_target_modules is None:
        # Not towers for images or sound beside the language model: text never reaches them.
        inside = {id(module) for module in (model.get_decoder() or model).modules()}
        head = model.get_output_embeddings()
        chosen = [
            name
            for name, module in model.named_modules()
            if isinstance(module, layers) and module is not head and id(module) in inside
            if name.rsplit(".", 1)[-1] not in ROUTERS
        ]
        if not chosen:
            raise ConfigError(
                f"`{config.model.source}` has no linear layer to adapt outside its head and routers",
                "name modules with --lora_target_modules, or train every weight with --full_ft",
            )
        return _shorten(chosen, named), []
    modules, parameters = [], []
    for target in config.lora_target_modules:
        if any(_names(target, name) for name in named):
            modules.append(target)
        elif any(_names(target, name) for name in fused):
            parameters.append(target)
        else:
            known = sorted(
                {name.rsplit(".", 1)[-1] for name in named} | {".".join(n.split(".")[-2:]) for n in fused}
            )
            raise ConfigError(
                f"`lora_target_modules` names `{target}`, which matches nothing in `{config.model.source}`",
                f"the model has {', '.join(f'`{name}`' for name in known)}",
            )
    if parameters and config.lora_dropout:
        raise ConfigError(
            f"`lora_target_modules` names experts (`{parameters[0]}`), which can't have dropout",
            "set --lora_dropout 0",
        )
    return modules, parameters


def add_adapters(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """Wrap `model` in LoRA adapters, float32 and trainable; everything else is frozen.

    The initial weights follow from `config.seed` alone, whatever the rank.
    """
    from peft import get_peft_model

    torch.manual_seed(config.seed)
    modules, parameters = choose_targets(model, config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_EXPECTED_WARNINGS)
        adapted = get_peft_model(
            model, _lora_config(config, modules, parameters), autocast_adapter_dtype=False
        )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def apply_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Wrap `model` in the adapter that lies in `folder`, for inference; its embeddings grow with the adapter's.

    Some kinds change the model's own weights: it isn't the base model any more, with the adapter turned off either
    (`adapter_files.leaves_base`).

    Raises:
        ModelError: the adapter doesn't fit the model, or can't be put on one as it was.
    """
    from peft import PeftModel

    check_repeatable(folder)
    rows = count_rows(model, read_adapter_shapes(folder), read_adapter_config(folder))
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_EXPECTED_WARNINGS)
            return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"can't put the adapter `{folder}` on `{model.name_or_path}`: {reason}",
            "give the base model that it was trained on with --model_path or --base_model",
        ) from error


def merge_adapter(adapted: PeftModel, folder: Path) -> PreTrainedModel:
    """Return the model with its adapter merged into its weights, as PEFT does it; `folder` is the adapter's.

    Weights that the model shares are apart afterwards: an adapter may have changed one of them alone.

    Raises:
        ModelError: PEFT can't merge an adapter of this kind.
    """
    _untie(adapted)
    try:
        merged: PreTrainedModel = adapted.merge_and_unload()
    except (AttributeError, ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"PEFT can't merge the adapter `{folder}`: {reason}",
            "export it by itself with --no_merge; `tunesmith evaluate --engine transformers` takes it as it is",
        ) from error
    merged.config.get_text_config().tie_word_embeddings = False
    return merged


def _untie(model: nn.Module) -> None:
    """Give every parameter that is found in a second place a copy of its own there."""
    seen = set()
    for module in list(model.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                copied = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                setattr(module, name, copied)
            seen.add(id(parameter))


def find_plain_adapter(module: Any) -> str | None:
    """Return the name of the one adapter of a frozen linear layer that nothing but LoRA changes, if it is such."""
    if type(getattr(module, "base_layer", None)) not in (nn.Linear, FrozenLinear):
        return None
    from peft.tuners.lora import Linear

    if type(module) is not Linear or len(module.lora_A) != 1:
        return None
    (adapter,) = module.lora_A
    biased = module.lora_B[adapter].bias is not None
    frozen = not any(parameter.requires_grad for parameter in module.base_layer.parameters())
    return str(adapter) if frozen and not biased and adapter not in module.lora_variant else None


def write_adapter(model: PeftModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter that PEFT and vLLM load as it is.

    Args:
        model: the adapted model; only its PEFT configuration and names are read, so it may be sharded.
        weights: the trainable parameters by the model's names, whole and on the CPU.
        folder: where `adapter_config.json` and `adapter_model.safetensors` are written.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    peft_config = model.peft_config[_ADAPTER_NAME]
    tensors = get_peft_model_state_dict(
        model, state_dict=weights, adapter_name=_ADAPTER_NAME, save_embedding_layers=False
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / ADAPTER_WEIGHTS,
        {"format": "pt"},
    )
    content: dict[str, Any] = peft_config.to_dict() | {"inference_mode": True}
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")


def _lora_config(config: TrainConfig, modules: list[str], parameters: list[str]) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(config.model.source),
        revision=config.model_revision,
    )


def _names(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _shorten(chosen: list[str], present: list[str]) -> list[str]:
    """Return the last parts of the chosen names where no other module shares them, else the full names."""
    others = {name.rsplit(".", 1)[-1] for name in set(present) - set(chosen)}
    return sorted({name if (last := name.rsplit(".", 1)[-1]) in others else last for name in chosen})
