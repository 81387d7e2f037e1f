"""LoRA adapters, through PEFT. The only import of peft."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.adapters.embeddings import grow_embeddings
from tunesmith.model.adapters.folder import (
    ADAPTER_WEIGHTS,
    check_repeatable,
    count_rows,
    module_name,
    plain_name,
    read_adapter_shapes,
)
from tunesmith.model.adapters.new_tokens import NewTokens
from tunesmith.model.adapters.offsets import OFFSET, begin_off_base
from tunesmith.model.adapters.prior import count_rows_needed, find_adapter
from tunesmith.model.adapters.stacked import AdapterFile, name_in_file, read_adapter_file, stack_adapters
from tunesmith.model.adapters.targets import choose_rows, choose_saved, choose_targets
from tunesmith.model.frozen_weights import FrozenLinear
from tunesmith.runs.base_model import read_adapter_config
from tunesmith.runs.folder import ADAPTER_CONFIG

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

_ADAPTER_NAME = "default"
_OF_ADAPTER = re.compile(rf"\.lora_\w+\.({_ADAPTER_NAME}|{OFFSET})(\.|$)")
# Of PEFT, about what is meant and seen to: what shares weights, and biases that turning an adapter off leaves on.
_EXPECTED_WARNINGS = (
    ".*tie_word_embeddings.*|fan_in_fan_out is set to False.*|.*ensure_weight_tying.*|.*lora_bias.*"
)
_MISFIT = "give the base model that it was trained on with --model_path or --hf_model_id"


def add_adapters(
    model: PreTrainedModel,
    config: TrainConfig,
    tokens: NewTokens | None = None,
    dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """Wrap `model` in LoRA adapters, float32 and trainable; everything else is frozen.

    The initial weights follow from `config.seed` alone, whatever the rank; or they are those of the adapter to go on
    from. Beside the adapters, the rows of new `tokens` and the modules to save are trained. `dtype` is what will be
    computed in.

    Raises:
        ConfigError, ModelError: this model can't be trained so.
    """
    from peft import get_peft_model

    torch.manual_seed(config.seed)
    settings = _prior_config(config) if config.goes_on else _lora_config(model, config, tokens)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_EXPECTED_WARNINGS)
            adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"PEFT can't adapt `{config.model.source}` so: {str(error).strip().splitlines()[0]}",
            "leave out the settings of the adapter that it names",
        ) from error
    if config.begins_off_base:
        begin_off_base(adapted, config.init_lora_weights, _plain_like(settings), dtype)
    if config.goes_on:
        _load_weights(adapted, find_adapter(_path_of(config)))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def apply_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Wrap `model` in the adapter that lies in `folder`, for inference; its embeddings grow with the adapter's.

    Some kinds change the model's own weights: it isn't the base model any more, with the adapter turned off either
    (`folder.leaves_base`).

    Raises:
        ModelError: the adapter doesn't fit the model, or can't be put on one as it was.
    """
    from peft import PeftModel

    check_repeatable(folder)
    rows = count_rows(model, read_adapter_shapes(folder), read_adapter_config(folder))
    if rows > model.get_input_embeddings().weight.shape[0]:
        grow_embeddings(model, rows)
    elif rows < model.get_input_embeddings().weight.shape[0]:
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


@torch.no_grad()
def merge_into_base(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return `model` with the adapter in `folder` added to its weights: summed in float32, rounded once.

    On the meta device there is nothing to add.

    Raises:
        ModelError: the adapter doesn't fit the model, or changes weights that are tied to others.
    """
    _refuse_tied(model, folder)
    if next(model.parameters()).is_meta:
        grow_embeddings(model, count_rows_needed(read_adapter_config(folder)))
        return model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import TrainableTokensWrapper

    adapted = apply_adapter(model, folder)
    for module in adapted.modules():
        if isinstance(module, LoraLayer) and _ADAPTER_NAME in module.scaling:
            weight = (
                module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight
            )
            delta = module.get_delta_weight(_ADAPTER_NAME).float()
            weight.data = weight.data.float().add_(delta).to(weight.dtype)
        elif isinstance(module, TrainableTokensWrapper) and not module.token_adapter.tied_adapter:
            layer = module.token_adapter
            rows = layer.trainable_tokens_delta[_ADAPTER_NAME]
            layer.base_layer.weight.data[layer.token_indices[_ADAPTER_NAME]] = rows.to(
                layer.base_layer.weight.dtype
            )
    merged: PreTrainedModel = adapted.unload()
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged


def _refuse_tied(model: PreTrainedModel, folder: Path) -> None:
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    tied = {module_name(model, layer) for layer in (embeddings, head)}
    for name in read_adapter_shapes(folder):
        module = plain_name(name).split(".lora_")[0]
        if ".lora_" in name and module in tied:
            raise ModelError(
                f"the adapter `{folder}` can't be merged into the base in memory: it adapts `{module}`, whose weights "
                "are also those of another layer",
                "export it with `tunesmith convert`, and begin from the export with --model_path",
            )


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


@dataclass(frozen=True)
class TokenRows:
    """A frozen embedding or head, and the rows that stand in place of its own for a few tokens."""

    layer: Any
    ids: tuple[int, ...]
    _held: Any

    @property
    def rows(self) -> torch.Tensor:
        """The trained rows, as they are by now: sharding puts other tensors in their place."""
        found: torch.Tensor = self._held[_ADAPTER_NAME]
        return found

    def ids_on(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.ids, device=device)


def find_token_rows(module: Any) -> TokenRows | None:
    """Return the rows that `module` has for tokens of their own, if it is PEFT's wrapper of an embedding or a head."""
    held = getattr(module, "token_adapter", None)
    if held is None:
        return None
    from peft.utils.other import TrainableTokensWrapper

    if not isinstance(module, TrainableTokensWrapper) or _ADAPTER_NAME not in held.token_indices:
        return None
    return TokenRows(held.base_layer, tuple(held.token_indices[_ADAPTER_NAME]), held.trainable_tokens_delta)


def is_kept(name: str, parameter: torch.Tensor) -> bool:
    """Return whether a parameter belongs into checkpoints: it is trained, or a frozen part of an adapter."""
    return parameter.requires_grad or _OF_ADAPTER.search(name) is not None


def write_adapter(
    model: PeftModel, weights: dict[str, torch.Tensor], folder: Path, beneath: Path | None = None
) -> None:
    """Write an adapter that PEFT and vLLM load as it is, on the base model as it was published.

    Args:
        model: the adapted model; only its PEFT configuration and names are read, so it may be sharded.
        weights: those that checkpoints hold, by the model's names, whole and on the CPU.
        folder: where `adapter_config.json` and `adapter_model.safetensors` are written.
        beneath: the adapter that was merged into the base model first; what is written holds it too.
    """
    from safetensors.torch import save_file

    own = f".{OFFSET}"
    tensors = {name_in_file(name, _ADAPTER_NAME): it for name, it in weights.items() if own not in name}
    content: dict[str, Any] = model.peft_config[_ADAPTER_NAME].to_dict() | {"inference_mode": True}
    if content["init_lora_weights"] not in (True, False, "gaussian"):
        content["init_lora_weights"] = (
            True  # how it began, which to PEFT is what to do with a base it is put on
        )
    file = AdapterFile(content, tensors)
    if OFFSET in model.peft_config:
        offset = {name_in_file(name, OFFSET): it for name, it in weights.items() if own in name}
        file = stack_adapters(file, AdapterFile(content, offset))
    if beneath is not None:
        file = stack_adapters(file, read_adapter_file(beneath))
    save_file(
        {name: tensor.contiguous() for name, tensor in file.tensors.items()},
        folder / ADAPTER_WEIGHTS,
        {"format": "pt"},
    )
    content = {
        key: sorted(value) if isinstance(value, set) else value for key, value in file.settings.items()
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")


def _lora_config(model: PreTrainedModel, config: TrainConfig, tokens: NewTokens | None) -> LoraConfig:
    from peft import LoraConfig

    modules, parameters = choose_targets(model, config)
    start: bool | str = {"true": True, "false": False}.get(config.init_lora_weights, config.init_lora_weights)
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.begins_off_base else start,
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=choose_saved(model, config),
        trainable_token_indices=choose_rows(model, config, tokens) if tokens is not None else None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(config.model.source),
        revision=config.model_revision,
    )


def _prior_config(config: TrainConfig) -> LoraConfig:
    """Return PEFT's settings of the adapter to go on from, with this run's dropout and base model."""
    from peft import LoraConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that a newer PEFT has written
        settings = LoraConfig.from_pretrained(str(find_adapter(_path_of(config))))
    settings.inference_mode = False
    settings.lora_dropout = config.lora_dropout
    settings.base_model_name_or_path = str(config.model.source)
    settings.revision = config.model_revision
    return settings


def _plain_like(settings: LoraConfig) -> LoraConfig:
    """Return settings of an adapter of the same modules and scale, without dropout and what is trained besides."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.use_rslora,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )


def _load_weights(model: PeftModel, folder: Path) -> None:
    """Put the weights of the adapter in `folder` into that of `model`, unless that is on the meta device."""
    if next(model.parameters()).is_meta:
        return
    from peft import set_peft_model_state_dict

    file = read_adapter_file(folder)
    try:
        found = set_peft_model_state_dict(model, file.tensors, _ADAPTER_NAME)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the adapter `{folder}` doesn't fit `{model.name_or_path}`: {reason}", _MISFIT
        ) from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = sorted({*found.unexpected_keys, *trained.intersection(found.missing_keys)})
    if wrong:
        raise ModelError(
            f"the adapter `{folder}` doesn't fit `{model.name_or_path}`: {', '.join(f'`{n}`' for n in wrong[:3])}",
            _MISFIT,
        )


def _path_of(config: TrainConfig) -> Path:
    assert config.adapter_path is not None
    return config.adapter_path
