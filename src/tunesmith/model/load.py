"""Weights and tokenizer of any Hugging Face causal language model."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.compat import (
    attention_name,
    compute_buffers,
    has_bfloat16_instructions,
    supports_flash_attention,
)
from tunesmith.config import ModelRef
from tunesmith.errors import MISSING_PACKAGE_HINT, ModelError
from tunesmith.model.attention_choice import WINDOWS, choose_attention
from tunesmith.model.chat_template import use_chat_template
from tunesmith.model.files.checks import (
    CONFIG,
    GENERATION_CONFIG,
    check_files,
    check_generation_config,
    read_object,
    refuse_adapter,
    refuse_torn_pickle,
)
from tunesmith.model.files.config_errors import explain_config
from tunesmith.model.files.tokenizer import open_tokenizer
from tunesmith.model.files.weight_files import list_weight_files
from tunesmith.model.quantized import check_quantization, dequantize_while_loading
from tunesmith.paths import is_dir, is_file
from tunesmith.runs.folder import ADAPTER_CONFIG

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_WEIGHT_FILES = ("*.safetensors", "*.bin")


def load_tokenizer(
    ref: ModelRef, folder: Path | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Return the tokenizer that lies in `folder`, as beside a checkpoint, else the model's.

    A `chat_template` takes the place of its own: a file, the name of another of its own, or the text itself.

    Raises:
        ModelError: it is absent, or can't be read.
        ConfigError: there is no such chat template.
    """
    if folder is None:
        check_model_path(ref)
    else:
        check_files(folder)
    options = _hub_options(ref) if folder is None else {"trust_remote_code": ref.trust_remote_code}
    try:
        tokenizer = open_tokenizer(folder or ref.source, **options)
    except ModelError:
        if (
            folder is None and ref.folder is not None
        ):  # transformers looks into the model's config for the class
            load_model_config(ref)
        raise
    if chat_template is not None:
        use_chat_template(tokenizer, chat_template)
    return tokenizer


def load_model_config(ref: ModelRef) -> PretrainedConfig:
    """Return the model's own configuration.

    Raises:
        ModelError: it is absent, malformed or not a causal language model's.
    """
    from transformers import AutoConfig

    check_model_path(ref)
    try:
        return AutoConfig.from_pretrained(ref.source, **_hub_options(ref))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loaded("config", ref, error) from error
    except Exception as error:  # huggingface_hub's for a field of another type, and what comes of a bad value
        raise _malformed(ref, error) from error


def build_meta_model(ref: ModelRef, model_config: PretrainedConfig) -> PreTrainedModel:
    """Return the model without weights: names and shapes alone, on the meta device.

    Raises:
        ModelError: the configuration is not a causal language model's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config, trust_remote_code=ref.trust_remote_code)
    except (ValueError, ImportError) as error:
        raise _not_loaded("model", ref, error) from error
    except Exception as error:  # what comes of a bad value, as negative widths
        raise _malformed(ref, error, has_config=True) from error


def load_model(
    ref: ModelRef,
    device: torch.device,
    dtype: torch.dtype,
    attn_implementation: str = "auto",
    reads_weights: bool = True,
) -> PreTrainedModel:
    """Return the model in its stored dtype on the CPU, its weights memory-mapped.

    What it will compute in, `dtype` on `device`, decides the attention. Mapped pages are shared by all processes of
    a machine; a cast here would make a private copy each, so `shard_model` casts after sharding. A quantized model
    is dequantized, each process for itself. Without `reads_weights` parameters, and buffers that the files hold, are
    on the meta device, of the dtypes that they would have.

    Raises:
        ModelError: the model is absent, transformers can't load it, or it is quantized in a way that isn't undone.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model_config = load_model_config(ref)
    check_quantization(model_config, str(ref.source))
    attention = choose_attention(
        model_config,
        device.type,
        dtype.itemsize == 2,
        attn_implementation,
        lambda: supports_flash_attention(build_meta_model(ref, model_config)),
    )
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            ref.source,
            dtype="auto",
            attn_implementation=attention,
            output_loading_info=True,
            # Not the model's own, which may hold what transformers refuses; nothing here generates by it.
            generation_config=GenerationConfig(),
            **_hub_options(ref),
            **dequantize_while_loading(model_config),
            **({} if reads_weights else {"device_map": "meta"}),
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loaded("model", ref, error) from error
    if found["missing_keys"]:
        # transformers would train them from random values.
        raise ModelError(
            f"the files of `{ref.source}` lack weights: {', '.join(sorted(found['missing_keys'])[:3])} …",
            "download the model again, or take one with a language-model head",
        )
    if not reads_weights:
        compute_buffers(model)
    return model


def load_end_tokens(ref: ModelRef, model_config: PretrainedConfig) -> set[int]:
    """Return the tokens that the model itself ends its answers with.

    Raises:
        ModelError: they are no numbers of tokens.
    """
    ends = read_generation_config(ref).get("eos_token_id")
    if ends is None:  # few models come without one
        ends = getattr(model_config.get_text_config(), "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
        raise ModelError(
            f"`eos_token_id` of `{ref.source}` is {ends!r}: it is the number of a token, or a list of such",
            "mend generation_config.json, or config.json where that has none",
        )
    return set(listed)


def read_generation_config(ref: ModelRef) -> dict[str, Any]:
    """Return what the model's `generation_config.json` says, {} where it has none.

    Raises:
        ModelError: it is no JSON object.
    """
    path = _find_file(ref, GENERATION_CONFIG)
    return {} if path is None else read_object(path)


def resolve_dtype(setting: str, device: torch.device) -> torch.dtype:
    """Return the compute type that `dtype` means; `auto` is bfloat16 where there are instructions for it."""
    import torch

    if setting != "auto":
        dtype: torch.dtype = getattr(torch, setting)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if has_bfloat16_instructions() else torch.float32


def narrowest_window(model: nn.Module) -> float:
    """Return the tokens that the narrowest attention of the model's layers reaches back; infinity: all."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    windows = [getattr(config, name, None) for name in WINDOWS]
    return min((window for window in windows if window), default=math.inf)  # 0: Qwen2-MoE's for none


def attention_of(model: nn.Module) -> str:
    """Return transformers' name of the attention backend that `model` uses."""
    return attention_name(model)


def find_weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder by name."""
    return sorted(path for pattern in _WEIGHT_FILES for path in folder.glob(pattern))


def check_model_path(ref: ModelRef) -> None:
    """Refuse a `model_path` that is no folder of a model.

    Raises:
        ModelError: with what is missing.
    """
    folder = ref.folder
    if folder is None:
        return
    if not is_dir(folder):
        hint = "give the folder that holds config.json and the weights, or name a model of the hub instead"
        if ref.given_as != "model_path":
            hint = "give a local folder as --model_path; a model of the hub is named owner/name"
        raise ModelError(f"`{ref.given_as}` is `{folder}`, which is not a folder", hint)
    refuse_adapter(folder)
    if not is_file(folder / CONFIG):
        raise ModelError(
            f"`{ref.given_as}` is `{folder}`, which holds no config.json",
            "give a Hugging Face model folder: config.json, weights, tokenizer",
        )
    check_files(folder)


def check_weights(ref: ModelRef) -> None:
    """Refuse a `model_path` that is no folder of a model, or whose weights are absent or torn.

    Cheap: it reads the files' heads alone.

    Raises:
        ModelError: it names the file.
    """
    from safetensors import SafetensorError, safe_open

    check_model_path(ref)
    folder = ref.folder
    if folder is None:
        _check_on_hub(ref)
        return
    if not find_weight_files(folder):
        raise ModelError(
            f"`{ref.given_as}` is `{folder}`, which holds no weights", "download the model again"
        )
    for path in list_weight_files(ref):
        if path.suffix != ".safetensors":
            refuse_torn_pickle(path)
            continue
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ModelError(
                f"`{path}` is not a whole safetensors file: {error}", "download it again"
            ) from error


def _check_on_hub(ref: ModelRef) -> None:
    """Refuse what only a look into the files tells of a model of the hub, as of a folder."""
    with suppress(OSError):  # told by what loads the model
        if adapter := _find_file(ref, ADAPTER_CONFIG):
            refuse_adapter(adapter.parent, str(ref.source))
        if generation := _find_file(ref, GENERATION_CONFIG):
            check_generation_config(generation)


def _find_file(ref: ModelRef, name: str) -> Path | None:
    """Return a file of the model, fetched if need be; None if it has none of that name, or can't be reached."""
    from transformers.utils import cached_file

    found = cached_file(
        str(ref.source),
        name,
        revision=ref.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found) if found else None


def _hub_options(ref: ModelRef) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": ref.trust_remote_code}
    if ref.revision is not None:
        options["revision"] = ref.revision
    return options


def _malformed(ref: ModelRef, error: Exception, has_config: bool = False) -> ModelError:
    """Return the error for a `config.json` of which no config, or else no model can be made."""
    from transformers import CONFIG_MAPPING

    def build(content: dict[str, Any]) -> object:
        model_config = CONFIG_MAPPING[content["model_type"]].from_dict(content)
        return build_meta_model(ModelRef("", None), model_config) if has_config else model_config

    if ref.folder is None:
        return explain_config(f"{CONFIG} of {ref.source}", error, {}, build)
    return explain_config(str(ref.folder / CONFIG), error, read_object(ref.folder / CONFIG), build)


def _not_loaded(what: str, ref: ModelRef, error: Exception) -> ModelError:
    reason = str(error).strip().split("\n")[0]
    if isinstance(error, ImportError):
        hint = MISSING_PACKAGE_HINT
    elif ref.folder is None:
        hint = "check the model's name, the network, and HF_TOKEN for a gated model; or give --model_path"
    else:
        hint = (
            "check that the folder is complete; --trust_remote_code allows a model that brings its own code"
        )
    return ModelError(f"can't load the {what} of `{ref.source}`: {reason}", hint)
