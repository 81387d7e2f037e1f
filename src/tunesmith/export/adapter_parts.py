"""What an adapter's tensors are for: which parameter each belongs to, and as what. Told from names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError
from tunesmith.model.adapters.folder import (
    FOREIGN_FEATURES,
    RECOMPUTED,
    Settings,
    Shape,
    is_saved_module,
    plain_name,
    trained_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<nesting>(\.base_layer)*)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?"
)
_MAGNITUDE = re.compile(r"(?P<module>.+?)\.lora_magnitude_vector(\.weight)?")
_LORA_BIAS = re.compile(r"(?P<module>.+?)\.lora_B\.bias")
_TOKENS = ".token_adapter.trainable_tokens_delta"


class ForeignAdapterError(ModelError):
    """The adapter is of a kind that only PEFT can merge."""


@dataclass(frozen=True)
class Factors:
    """The two matrices of a parameter's delta, by their names in the adapter's file.

    `num_experts` is None for a plain matrix. `transposed`: the parameter is stored in × out.
    """

    a: str
    b: str
    scale: float
    transposed: bool = False
    num_experts: int | None = None


@dataclass(frozen=True)
class Part:
    """What an adapter does to one parameter, in this order; tensors by their names in its file.

    `whole` takes the base's place, trained itself or not. `init`, pissa or olora, takes what the training began with
    off it. The product of `factors` is added, or `bias`, a tensor and its factor. `magnitude` scales the sum to its
    lengths (DoRA). `tokens` are rows that take the place of those of these numbers, which may lie beyond the base's.
    """

    whole: str | None = None
    init: str | None = None
    factors: Factors | None = None
    magnitude: str | None = None
    bias: tuple[str, float] | None = None
    tokens: tuple[str, tuple[int, ...]] | None = None

    @property
    def is_sum(self) -> bool:
        """Whether something is added to the base's tensor, or it is replaced, and that is all."""
        return not (self.init or self.magnitude or self.tokens or self == Part())


@dataclass(frozen=True)
class Parts:
    """`parameters`: what an adapter does to each that it changes.

    `files`: what it adds to tensors of the base's files that transformers makes a parameter of only together, as it
    stacks experts: adapters of older versions name those one by one.
    """

    parameters: dict[str, Part]
    files: dict[str, Factors]


def read_parts(
    model: PreTrainedModel, settings: Settings, shapes: Mapping[str, Shape], in_files: Collection[str]
) -> Parts:
    """Return what an adapter changes; `in_files` are the names of the tensors in the base's files.

    Raises:
        ForeignAdapterError: only PEFT can tell.
        ModelError: a tensor is missing.
    """
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ForeignAdapterError(f"the adapter's type is {kind}")
    for name, off in FOREIGN_FEATURES.items():
        if (settings.get(name) or off) != off:
            raise ForeignAdapterError(f"the adapter sets `{name}`")
    reader = _Reader(model, settings, shapes, in_files)
    for name in shapes:
        reader.add(name)
    return Parts(reader.parts, reader.files)


class _Reader:
    def __init__(
        self,
        model: PreTrainedModel,
        settings: Settings,
        shapes: Mapping[str, Shape],
        in_files: Collection[str],
    ) -> None:
        self._model, self._settings, self._shapes, self._in_files = model, settings, shapes, in_files
        self.files: dict[str, Factors] = {}
        self._tokens = trained_tokens(model, settings)
        self._known = model.state_dict().keys()
        self.parts: dict[str, Part] = {}

    def add(self, name: str) -> None:
        """Take in a tensor of the adapter's file."""
        path = name.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(path):
            if match["factor"] == "A":
                self._add_factors(name, match["module"], match["nesting"].count("."))
        elif match := _MAGNITUDE.fullmatch(path):
            if f"{match['module']}.weight" not in self._known:
                raise ForeignAdapterError(f"the adapter holds `{name}`")
            self._update(f"{match['module']}.weight", magnitude=name)
        elif match := _LORA_BIAS.fullmatch(path):
            self._add_bias(name, match["module"])
        elif path.endswith(_TOKENS):
            module = path.removesuffix(_TOKENS)
            # A head that shares its weights with the embeddings has their tokens.
            tokens = self._tokens.get(module) or next(iter(self._tokens.values()), ())
            self._update(f"{module}.weight", tokens=(name, tokens))
        else:
            self._add_whole(name)

    def _update(self, parameter: str, **changes: Any) -> None:
        self.parts[parameter] = replace(self.parts.get(parameter, Part()), **changes)

    def _add_whole(self, name: str) -> None:
        parameter = plain_name(name)
        if parameter not in self._known:
            raise ForeignAdapterError(f"the adapter holds `{name}`")
        # PEFT writes some modules twice: as they were trained, and as they were before.
        is_before = is_saved_module(parameter, self._settings) and ".original_module." in name
        if not is_before:
            self._update(parameter, whole=name)

    def _add_bias(self, name: str, module: str) -> None:
        if f"{module}.bias" not in self._known:
            raise ModelError(
                f"the adapter trained a bias for `{module}` (`lora_bias`), which has none to add it to",
                "export it by itself with --no_merge; `tunesmith evaluate --engine transformers` takes it as it is",
            )
        rank = self._shapes[f"{name.removesuffix('B.bias')}A.weight"][0]
        self._update(f"{module}.bias", bias=(name, self._scale(f"{module}.weight", rank)))

    def _add_factors(self, name: str, path: str, nesting: int) -> None:
        b = re.sub(r"(.*lora_(embedding_)?)A", r"\1B", name)
        if b not in self._shapes:
            raise ModelError(f"the adapter holds `{name}` without `{b}`", "get the adapter again")
        stored = f"{path}.weight"
        if stored in self._in_files and stored not in self._known:
            self.files[stored] = Factors(name, b, self._scale(stored, self._shapes[name][0]))
            return
        parameter, form = self._form(path, nesting)
        rank = self._shapes[name][0] // (form.get("num_experts") or 1)
        factors = Factors(name, b, self._scale(parameter, rank), **form)
        self._update(parameter, factors=factors, init=self._init(path, factors))

    def _init(self, path: str, factors: Factors) -> str | None:
        """Return how the training began to change the weights of a linear layer, if it did."""
        init = self._settings.get("init_lora_weights")
        if not isinstance(init, str) or init.lower() not in RECOMPUTED or "lora_embedding_" in factors.a:
            return None
        tied = f"{path}.weight" in {
            *self._model.all_tied_weights_keys,
            *self._model.all_tied_weights_keys.values(),
        }
        if tied or factors.num_experts is not None or (init.lower() == "olora" and factors.transposed):
            raise ForeignAdapterError(f"`{path}` began with {init}")
        return init.lower()

    def _form(self, path: str, nesting: int) -> tuple[str, dict[str, Any]]:
        """Return the parameter that a module's adapter changes, and what `Factors` says of its form."""
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            return f"{path}.weight", {}  # of another model: the check of all shapes says so
        adapted = [
            parameter
            for parameter, _ in module.named_parameters(recurse=False)
            for target in self._settings.get("target_parameters") or ()
            if f"{path}.{parameter}" == target or f"{path}.{parameter}".endswith(f".{target}")
        ]
        if adapted:
            if nesting >= len(adapted):
                raise ForeignAdapterError(f"`{path}` has more adapters than `target_parameters`")
            # PEFT wraps a module once for each parameter; the last one is outside.
            parameter = adapted[-1 - nesting]
            tensor = module.get_parameter(parameter)
            if tensor.dim() == 2:
                return f"{path}.{parameter}", {}
            stored_in_out = bool(getattr(module, "is_transposed", False))
            return f"{path}.{parameter}", {"transposed": stored_in_out, "num_experts": tensor.shape[0]}
        if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            raise ForeignAdapterError(f"`{path}` is a {type(module).__name__}")
        return f"{path}.weight", {"transposed": not isinstance(module, nn.Linear)}

    def _scale(self, parameter: str, rank: int) -> float:
        patterns: Mapping[str, float] = self._settings.get("alpha_pattern") or {}
        names = (parameter, parameter.rpartition(".")[0])
        alphas = (
            alpha
            for pattern, alpha in patterns.items()
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
        )
        alpha = next(alphas, self._settings["lora_alpha"])
        return alpha / math.sqrt(rank) if self._settings.get("use_rslora") else alpha / rank
