"""Which of a model's modules are adapted, which trained whole, and which have rows for new tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.compat import names_of_experts
from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.model.adapters.new_tokens import NewTokens
from tunesmith.model.frozen_weights import ROUTERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Whose layers PEFT (0.21) refuses by name: peft.tuners.tuners_utils._check_lora_target_modules_mamba.
_STATE_SPACES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_OF_STATE_SPACES = frozenset({"out_proj", "conv1d"})


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
        chosen = _without_refused(model, chosen, config.lora_dropout > 0)
        if not chosen:
            raise ConfigError(
                f"`{config.model.source}` has no linear layer to adapt outside its head and routers",
                "name modules with --lora_target_modules, or train every weight with --full_ft",
            )
        return _shorten(chosen, [name for name, _ in model.named_modules()]), []
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
    if parameters and config.begins_off_base:
        raise ConfigError(
            f"`init_lora_weights` is {config.init_lora_weights}, which PEFT has for linear layers alone, and "
            f"`lora_target_modules` names experts (`{parameters[0]}`)",
            "leave one of the two out",
        )
    if parameters and config.lora_dropout:
        raise ConfigError(
            f"`lora_target_modules` names experts (`{parameters[0]}`), which can't have dropout",
            "set --lora_dropout 0",
        )
    return modules, parameters


def _without_refused(model: PreTrainedModel, chosen: list[str], has_dropout: bool) -> list[str]:
    """Return the layers that PEFT adapts: it takes some names for what can't be, or can't be with dropout."""
    refused = names_of_experts(model) if has_dropout else frozenset()
    if model.config.model_type in _STATE_SPACES:
        refused |= _OF_STATE_SPACES
    left_out = {last for name in chosen if (last := name.rsplit(".", 1)[-1]) in refused}
    if left_out:
        listed = ", ".join(f"`{name}`" for name in sorted(left_out))
        why = "PEFT takes layers of these names for experts, which can't have dropout, or can't adapt them"
        logger.info("%s of a `%s` model aren't adapted: %s", listed, model.config.model_type, why)
    return [name for name in chosen if name.rsplit(".", 1)[-1] not in left_out]


def choose_saved(model: PreTrainedModel, config: TrainConfig) -> list[str] | None:
    """Return the modules to train whole, each by the end of its name, as PEFT has them.

    Raises:
        ConfigError: one matches nothing, or a list of modules.
    """
    if config.modules_to_save is None:
        return None
    named = {name: module for name, module in model.named_modules() if name}
    for target in config.modules_to_save:
        found = [name for name in named if name.endswith(target)]
        if not found:
            known = sorted({name.rsplit(".", 1)[-1] for name in named if not name[-1].isdigit()})
            raise ConfigError(
                f"`modules_to_save` names `{target}`, which matches nothing in `{config.model.source}`",
                f"the model has {', '.join(f'`{name}`' for name in known)}",
            )
        if any(isinstance(named[name], nn.ModuleList | nn.ModuleDict) for name in found):
            raise ConfigError(
                f"`modules_to_save` names `{target}`, which is a list of modules",
                "name the modules in it, or train every weight with --full_ft",
            )
    return config.modules_to_save


def choose_rows(
    model: PreTrainedModel, config: TrainConfig, tokens: NewTokens
) -> dict[str, list[int]] | None:
    """Return the rows that are trained for new tokens, by the name of their layer; tied ones once.

    A layer that is trained whole has no rows of its own; None if no layer has any.

    Raises:
        ConfigError: PEFT can't train the rows of this model.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embeddings.weight
    layers = {"embeddings": embeddings} if is_tied else {"embeddings": embeddings, "head": head}
    names = {what: _name_of(model, layer) for what, layer in layers.items() if layer is not None}
    saved = {
        what: any(name.endswith(target) for target in config.modules_to_save or ())
        for what, name in {**names, "head": _name_of(model, head)}.items()
    }
    if is_tied and saved["embeddings"] != saved["head"]:
        raise ConfigError(
            "`modules_to_save` names one of embeddings and head, which share their weights; the other one's rows for "
            "new tokens would stay as they are",
            f"name both, {_short_name(model, names['embeddings'])},{_short_name(model, _name_of(model, head))}, or none",
        )
    if not is_tied and getattr(head, "bias", None) is not None and not saved["head"]:
        raise ConfigError(
            f"the head of `{config.model.source}` has a bias, which PEFT leaves out where it trains rows for new tokens",
            f"train it whole with --modules_to_save {_short_name(model, names['head'])}",
        )
    rows = {_short_name(model, name): [*tokens.ids] for what, name in names.items() if not saved[what]}
    return rows or None


def _name_of(model: PreTrainedModel, layer: nn.Module) -> str:
    name: str = next(name for name, module in model.named_modules() if module is layer)
    return name


def _short_name(model: PreTrainedModel, name: str) -> str:
    """Return the last part of a module's name where no other name ends so, else the full one."""
    short = name.rsplit(".", 1)[-1]
    return short if sum(other.endswith(short) for other, _ in model.named_modules()) == 1 else name


def _names(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _shorten(chosen: list[str], present: list[str]) -> list[str]:
    """Return the last parts of the chosen names where no other module shares them, else the full names."""
    others = {name.rsplit(".", 1)[-1] for name in set(present) - set(chosen)}
    return sorted({name if (last := name.rsplit(".", 1)[-1]) in others else last for name in chosen})
