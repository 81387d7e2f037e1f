"""What an evaluation works with, found and checked before anything is generated or written."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.config import EvaluateConfig, ModelRef
from tunesmith.errors import ConfigError
from tunesmith.evaluate.answers import Answer, AnswerReader
from tunesmith.evaluate.base_side import examine_adapter, word_for_base
from tunesmith.evaluate.engines.base import Generation, Variant
from tunesmith.evaluate.engines.choose import choose_engine
from tunesmith.evaluate.test_set import TestSet, read_test_set
from tunesmith.export.whole import weights_digest
from tunesmith.model.adapters.folder import check_repeatable, read_adapter_shapes
from tunesmith.model.files.fingerprint import model_fingerprint
from tunesmith.model.files.state import list_weights
from tunesmith.model.files.tokenizer_files import holds_tokenizer
from tunesmith.model.fit import check_adapter_fits, check_state_fits
from tunesmith.model.load import (
    build_meta_model,
    check_weights,
    load_end_tokens,
    load_model_config,
    load_tokenizer,
    resolve_dtype,
)
from tunesmith.model.positions import check_length, find_position_limit, named_positions
from tunesmith.model.quantized import check_quantization
from tunesmith.model.vocabulary import check_prompt_tokens
from tunesmith.paths import expand_user, longest_name, shorten_name
from tunesmith.runs.base_model import read_adapter_config
from tunesmith.runs.tuned import TunedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The models, the samples and the engine of one evaluation. Lengths are in tokens."""

    tuned: TunedModel
    base: ModelRef | None
    """None where the tuned model is evaluated alone."""
    reader: AnswerReader
    test_set: TestSet
    engine: str
    dtype: str
    max_model_len: int
    stop_token_ids: tuple[int, ...]
    trust_remote_code: bool
    base_fingerprint: str | None
    base_is_recorded: bool
    """Whether the base model to compare is the very one that the run was started from."""
    base_prompts: Mapping[int, tuple[int, ...]]
    """By sample, the prompts that the base model reads in other tokens than the tuned one."""
    leaves_base: bool
    """An adapter that is turned off leaves the base model as it is."""
    base_rows: int
    """How many tokens the base model knows."""

    @property
    def variants(self) -> list[Variant]:
        return ["tuned", "base"] if self.base is not None else ["tuned"]

    def stops_of(self, variant: Variant) -> tuple[int, ...]:
        """Return the tokens that end an answer, without those that the base model lacks."""
        is_tuned = variant == "tuned"
        return tuple(token for token in self.stop_token_ids if is_tuned or token < self.base_rows)

    def asked_references(self) -> list[Answer]:
        """Return the expected answers of the samples that are asked."""
        return [self.test_set.references[number] for number in self.test_set.samples]

    def read(self, generation: Generation) -> Answer:
        """Return what of an answer is compared, and its reasoning."""
        prompt = self.test_set.samples[generation.sample]
        return self.reader.read_generated(generation.token_ids, prompt.text)

    def identity(self, config: EvaluateConfig) -> dict[str, Any]:
        """Return everything that shapes a generation, by the names that a message calls it."""
        sampling = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "seed")}
        if self.engine == "transformers":
            sampling["way of sampling"] = "by sample"  # earlier versions drew by batch
        return {
            "tuned weights": weights_digest(self.tuned),
            "base_model": self.base_fingerprint,
            "test set": self.test_set.digest,
            "engine": self.engine,
            "dtype": self.dtype,
            "max_tokens": config.max_tokens,
            "max_model_len": config.max_model_len,
            "stop tokens": list(self.stop_token_ids),
            **(sampling if config.temperature > 0 else {"temperature": 0.0}),
        }


def make_plan(config: EvaluateConfig, tuned: TunedModel, use_gpu: bool) -> Plan:
    """Find everything that the evaluation needs, and refuse what can't work.

    Raises:
        ConfigError, DataError, ModelError: bad input.
    """
    _check_kind(config, tuned)
    base = tuned.base if config.compare == "base" else None
    if config.compare == "base" and tuned.base is None:
        if "compare" in config.model_fields_set:
            raise ConfigError(
                f"`compare` is base, but the base model of `{tuned.folder}` isn't known",
                "give --model_path or --base_model",
            )
        logger.info("no base model is known: `%s` is evaluated alone (--model_path names one)", tuned.folder)
    trusts = config.trust_remote_code or (tuned.base is not None and tuned.base.trust_remote_code)
    loaded = ModelRef(tuned.folder, None, trusts)
    if tuned.kind != "model":
        assert tuned.base is not None, "only a whole model has no base"
        loaded = tuned.base
    model_config = base_config = load_model_config(loaded)
    engine = choose_engine(config)
    if engine == "transformers":  # vLLM computes with what is quantized
        check_quantization(model_config, str(loaded.source))
    check_weights(loaded)
    if loaded is not tuned.base and tuned.base is not None:
        base_config = load_model_config(tuned.base)
    has_own_base = tuned.base is not None and is_recorded(tuned, tuned.base)
    model = build_meta_model(loaded, model_config)
    check_fit(tuned, model, has_own_base)
    effect = examine_adapter(tuned, model)
    if config.max_model_len is not None:
        check_length(model, config.max_model_len, "max_model_len", str(loaded.source))
    beside = tuned.folder if holds_tokenizer(tuned.folder) else None
    tokenizer = load_tokenizer(loaded, beside, config.chat_template)
    test_set = read_test_set(tuned, config, tokenizer)
    check_prompt_tokens(
        (prompt.input_ids for prompt in test_set.samples.values()),
        tokenizer,
        effect.num_known,
        str(tuned.folder),
    )
    base_prompts: Mapping[int, tuple[int, ...]] = {}
    if base is not None:
        if base is not loaded:
            check_weights(base)
        base_prompts = word_for_base(test_set, tokenizer, base, base_config)
    longest = max([test_set.longest_prompt, *map(len, base_prompts.values())]) + config.max_tokens
    positions = find_position_limit(model) or named_positions(model_config) or longest
    max_model_len = config.max_model_len or min(longest, positions)
    test_set = test_set.within(max_model_len, base_prompts)
    ends = test_set.end_tokens | load_end_tokens(loaded, model_config) | {tokenizer.eos_token_id}
    return Plan(
        tuned,
        base,
        AnswerReader(tokenizer),
        test_set,
        engine,
        choose_dtype(config.dtype, tuned, use_gpu),
        max_model_len,
        # A model's configuration may name tokens that it doesn't have.
        tuple(sorted(token for token in ends if token < effect.num_known)),
        trusts,
        model_fingerprint(tuned.base) if tuned.base is not None else None,
        base is not None and has_own_base,
        base_prompts,
        effect.leaves_base,
        base_config.get_text_config().vocab_size,
    )


def evaluation_folder(config: EvaluateConfig, tuned: TunedModel) -> Path:
    """Return where the results go: into the run, outside the checkpoint; else into the home.

    Other test sets than the run's own, and folders of the same name, have folders of their own.
    """
    test_name = f"-{Path(config.test_dataset).stem}" if config.test_dataset is not None else ""
    if config.test_config is not None:
        test_name += f"-{re.sub(r'[^A-Za-z0-9]+', '_', config.test_config)}"
    if config.test_split is not None:
        test_name += f"-{re.sub(r'[^A-Za-z0-9]+', '_', config.test_split)}"
    if tuned.run is not None:
        return tuned.run.evaluation_path(
            shorten_name(f"{tuned.folder.name}{test_name}", longest_name(tuned.run.path))
        )
    home = expand_user(config.home) if config.home else Path("runs")
    place = hashlib.blake2b(str(tuned.folder.resolve()).encode(), digest_size=4).hexdigest()
    name = shorten_name(f"{tuned.folder.name}-{place}{test_name}", longest_name(home))
    return home.absolute() / "evaluation" / name


def _check_kind(config: EvaluateConfig, tuned: TunedModel) -> None:
    is_full = tuned.kind != "adapter"
    if config.full_ft is not None and config.full_ft != is_full:
        found = "a whole model" if is_full else "a LoRA adapter"
        raise ConfigError(
            f"`full_ft` is {str(config.full_ft).lower()}, but `{tuned.folder}` holds {found}",
            "leave `full_ft` out: the folder says what it holds",
        )


def is_recorded(tuned: TunedModel, base: ModelRef) -> bool:
    """Return whether `base` is the very model that the run was started from."""
    recorded = tuned.params["model"]["fingerprint"] if tuned.params else None
    return recorded is not None and model_fingerprint(base, like=recorded) == recorded


def check_fit(tuned: TunedModel, model: PreTrainedModel, has_own_base: bool) -> None:
    """Refuse a base model that the tuned weights don't belong to; warn of another than the recorded one.

    Raises:
        ModelError: it names what is absent, or of another shape.
    """
    if tuned.kind == "model":
        return
    assert tuned.base is not None
    if tuned.kind == "adapter":
        check_repeatable(tuned.folder)
        settings = read_adapter_config(tuned.folder)
        check_adapter_fits(model, read_adapter_shapes(tuned.folder), str(tuned.base.source), settings)
    else:
        shapes = {name: tuple(weight.shape) for name, weight in list_weights(tuned.folder).items()}
        check_state_fits(model, shapes, str(tuned.base.source))
    if tuned.params and not has_own_base:
        logger.warning(
            "`%s` isn't the very base model that was trained on (%s), though its shapes are the same",
            tuned.base.source,
            tuned.params["model"]["fingerprint"],
        )


def choose_dtype(setting: str, tuned: TunedModel, use_gpu: bool) -> str:
    """Return the compute type that `dtype` means for a tuned model; auto: that of its training."""
    if setting != "auto":
        return setting
    if tuned.params is not None and tuned.params["resolved"]:
        return str(tuned.params["resolved"]["dtype"])
    if use_gpu and not torch.cuda.is_available():  # they are elsewhere in the cluster
        return "bfloat16"
    device = torch.device("cuda" if use_gpu else "cpu")
    return str(resolve_dtype("auto", device)).removeprefix("torch.")
