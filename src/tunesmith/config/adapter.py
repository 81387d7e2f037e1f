"""The settings of what is trained: adapters and how they begin, tokens, whole modules, or every weight."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from tunesmith.config.declare import Names, OptionalPath, Settings, setting
from tunesmith.errors import ConfigError

PLAIN_STARTS = ("true", "false", "gaussian", "orthogonal", "mica")
"""PEFT's ways to begin an adapter that leave the base model as it is."""

STARTS = "one of true, false, gaussian, orthogonal, mica, olora, pissa, pissa_niter_N"
STARTS_PATTERN = r"^(true|false|gaussian|orthogonal|mica|olora|pissa|pissa_niter_[1-9][0-9]*)$"

# Why PEFT's other ways aren't for a training that has its weights and its settings alone.
_REFUSED_STARTS = {
    "eva": "it asks for activations of the model on its data before adapters are made",
    "corda": "it asks for covariances of the model on its data before adapters are made",
    "lora_ga": "it asks for gradients of the model on its data before adapters are made",
    "loftq": "it is for base weights that are quantized for training",
}


def _refuse_by_name(value: Any) -> Any:
    if isinstance(value, str) and value in _REFUSED_STARTS:
        raise ValueError(f"{value} can't be had: {_REFUSED_STARTS[value]}")
    return value


class AdapterSettings(Settings):
    """What is trained of the model, and what that begins as."""

    full_ft: bool = setting(
        False, "Train every weight instead of LoRA adapters.", group="adapter", scope="model"
    )
    lora_rank: int = setting(32, "Rank of the LoRA adapters.", group="adapter", scope="model", ge=1)
    lora_alpha: float = setting(
        32,
        "LoRA scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA.",
        group="adapter",
        scope="model",
        gt=0,
    )
    lora_dropout: float = setting(
        0.1, "Dropout before the adapters; 0 is none.", group="adapter", scope="model", ge=0, lt=1
    )
    lora_target_modules: Names = setting(
        None,
        "Modules to adapt, by name (q_proj,v_proj); unset: every linear layer but the head, routers and fused experts.",
        group="adapter",
        scope="model",
    )
    use_rslora: bool = setting(False, "Scale adapters by alpha / sqrt(rank).", group="adapter", scope="model")
    use_dora: bool = setting(
        False,
        "Train each adapted weight's magnitude beside its direction (DoRA).",
        group="adapter",
        scope="model",
    )
    init_lora_weights: Annotated[str, BeforeValidator(_refuse_by_name)] = setting(
        "true",
        "How adapters begin, in PEFT's words: true, false, gaussian, orthogonal, mica, olora, pissa, pissa_niter_N.",
        group="adapter",
        scope="model",
        pattern=STARTS_PATTERN,
    )
    new_tokens: Names = setting(
        None,
        "Special tokens to add to the tokenizer (<|im_start|>,<|im_end|>); their rows of embeddings and head are trained.",
        group="adapter",
        scope="model",
    )
    modules_to_save: Names = setting(
        None,
        "Modules to train whole beside the adapters, by the ends of their names (embed_tokens,lm_head); each copy is kept with the adapter.",
        group="adapter",
        scope="model",
    )
    adapter_path: OptionalPath = setting(
        None,
        "LoRA adapter to go on from: a PEFT folder, or a run, a checkpoint or final/ of one; its settings are taken over.",
        group="adapter",
        scope="model",
    )
    merge_adapter: bool = setting(
        False,
        "Merge the adapter of adapter_path into the base model first, and train a fresh one, or with full_ft every weight.",
        group="adapter",
        scope="model",
    )

    @property
    def begins_off_base(self) -> bool:
        """Whether adapters begin as a part of the base weights rather than as nothing."""
        return self.init_lora_weights not in PLAIN_STARTS

    @property
    def goes_on(self) -> bool:
        """Whether the adapter of `adapter_path` is trained further."""
        return self.adapter_path is not None and not self.merge_adapter

    @property
    def adapts_more(self) -> bool:
        """Whether anything is asked of what is trained that plain LoRA, or every weight, doesn't have."""
        names = ("use_dora", "init_lora_weights", "new_tokens", "modules_to_save", "adapter_path")
        return any(getattr(self, name) != type(self).model_fields[name].default for name in names)

    @property
    def needs_weights(self) -> bool:
        """Whether what is trained begins as something made of the base model's weights."""
        begins_as_weights = self.begins_off_base or self.init_lora_weights == "mica" or self.use_dora
        return bool(begins_as_weights or self.new_tokens or self.modules_to_save or self.adapter_path)

    def check_adapter(self) -> None:
        """Refuse settings of this group that contradict one another.

        Raises:
            ConfigError: it names two of them.
        """
        for token in self.new_tokens or ():
            if not token.strip() or (self.new_tokens or []).count(token) > 1:
                problem = "is named twice" if token.strip() else "is white space alone"
                raise ConfigError(f"`new_tokens`: `{token}` {problem}", "name each token once")
        if self.merge_adapter and self.adapter_path is None:
            raise ConfigError("`merge_adapter` has no adapter to merge", "give its --adapter_path")
        of_adapters = {
            "use_dora": self.use_dora,
            "init_lora_weights": self.init_lora_weights != "true",
            "modules_to_save": self.modules_to_save is not None,
            "adapter_path": self.goes_on,
        }
        asked = next((name for name, is_asked in of_adapters.items() if is_asked), None)
        if self.full_ft and asked is not None:
            merged = (
                ", or begin from that adapter's weights with --merge_adapter true" if self.goes_on else ""
            )
            raise ConfigError(
                f"`{asked}` is for adapters, and `full_ft` trains every weight",
                f"leave one of the two out{merged}",
            )
        for name in ("new_tokens", "init_lora_weights"):
            if self.goes_on and getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"`{name}` is for adapters that begin anew, and that of `adapter_path` goes on",
                    f"leave `{name}` out, or begin a fresh adapter on top with --merge_adapter true",
                )
        if self.use_dora and self.begins_off_base:
            raise ConfigError(
                f"`use_dora` counts on whole base weights, and `init_lora_weights` {self.init_lora_weights} takes a "
                "part of them away",
                "leave one of the two out",
            )
        if self.use_dora and self.merge_adapter:
            raise ConfigError(
                "`use_dora` with `merge_adapter` would give an adapter that fits no published model",
                "export the other adapter with `tunesmith convert`, and give the export as --model_path",
            )
        if self.init_lora_weights == "orthogonal" and self.lora_rank % 2:
            raise ConfigError(
                f"`init_lora_weights` orthogonal asks for an even rank, and `lora_rank` is {self.lora_rank}",
                "make it even",
            )
