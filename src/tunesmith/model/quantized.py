"""Models that come quantized: trained on where transformers dequantizes them while it loads them, else refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# transformers' names of the methods that it dequantizes, for every device.
_DEQUANTIZED = ("fp8", "mxfp4")


def is_quantized(model_config: PretrainedConfig) -> bool:
    """Return whether a model's weights are stored quantized."""
    return _settings_of(model_config) is not None


def check_quantization(model_config: PretrainedConfig, source: str) -> None:
    """Refuse a model whose weights are stored quantized in a way that can't be trained on.

    Raises:
        ModelError: it names the method.
    """
    settings = _settings_of(model_config)
    if settings is None or settings.get("quant_method") in _DEQUANTIZED:
        return
    method = settings.get("quant_method") or "a method without a name"
    raise ModelError(
        f"`{source}` is quantized with {method}, and can't be computed with here",
        "give the model that it was made from, unquantized; "
        f"{' and '.join(_DEQUANTIZED)} models are dequantized while they are loaded",
    )


def dequantize_while_loading(model_config: PretrainedConfig) -> dict[str, Any]:
    """Return what to tell transformers so that a quantized model gets plain weights; nothing for another.

    Left to itself, it does so on some devices alone.
    """
    settings = _settings_of(model_config)
    if settings is None:
        return {}
    model_config.quantization_config = {**settings, "dequantize": True}
    return {"config": model_config}


def _settings_of(model_config: PretrainedConfig) -> dict[str, Any] | None:
    settings = getattr(model_config, "quantization_config", None)
    return settings if settings is None or isinstance(settings, dict) else settings.to_dict()
