"""A model whose weights are still in its files: each worker reads what it holds of them, once it is known where.

Beside its slices no worker then holds more than what one parameter is made of. transformers alone makes one tensor of
a layer's experts, which the files have one by one, and so each process would hold all experts of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith.compat import locate_slice
from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.model.files.weight_names import NameMap
from tunesmith.model.files.weight_parts import WeightParts
from tunesmith.model.files.weight_source import open_source
from tunesmith.model.load import load_model, load_model_config
from tunesmith.model.quantized import is_quantized
from tunesmith.parallel.casting import Fill

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


class UnreadWeights:
    """The weights of a model, in its files.

    Until `release`, the model's parameters are stand-ins, of the right shape and dtype on the CPU, without memory:
    what is added to the model finds a place beside them, and what is made of them is NaN.

    Attributes:
        model: the model, as transformers has it.
    """

    def __init__(self, model: PreTrainedModel, parts: WeightParts) -> None:
        self.model = model
        self._parts = parts
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        for name, buffer in [*model.named_buffers()]:
            if buffer.is_meta:
                parent, _, last = name.rpartition(".")
                setattr(
                    model.get_submodule(parent), last, parts.read(name, buffer.dtype, tuple(buffer.shape))
                )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        made = _replace_parameters(model, lambda parameter, _: _stand_in(parameter))
        # With the parameters themselves: no other gets the number of one that lives.
        self._stand_ins = {id(new): (new, names[id(old)]) for old, new in made}
        self._released: dict[str, str] = {}

    def is_untouched(self, model: nn.Module) -> bool:
        """Return whether nothing in `model`, which the unread one became, was made of its weights."""
        parameters = {id(parameter): parameter for parameter in model.parameters()}
        added = [parameters[key] for key in parameters.keys() - self._stand_ins.keys()]
        has_all = self._stand_ins.keys() <= parameters.keys()
        return has_all and not any(bool(p.isnan().any()) for p in added if p.is_floating_point())

    def release(self, model: nn.Module) -> Fill:
        """Move the stand-ins in `model` to the meta device, where sharding and casting them costs nothing.

        Returns what reads the part of them that this rank then holds, and puts it on a device.
        """
        for path, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in self._stand_ins:
                self._released[path] = self._stand_ins[id(parameter)][1]
        _replace_parameters(
            model,
            lambda p, _: (
                torch.empty(p.shape, dtype=p.dtype, device="meta") if id(p) in self._stand_ins else None
            ),
        )
        self._stand_ins.clear()
        return self._fill

    def _fill(self, model: nn.Module, device: torch.device) -> None:
        _replace_parameters(model, lambda p, path: self._read(p, path, device) if p.is_meta else None)

    def _read(self, parameter: Tensor, path: str, device: torch.device) -> Tensor:
        name = self._released[path]
        if not isinstance(parameter, DTensor):
            whole = self._parts.read(name, self._dtypes[name], tuple(parameter.shape))
            return whole.to(device, parameter.dtype)
        # Cast as transformers does first, so that any two dtypes give what they always gave.
        part = self._parts.read(name, self._dtypes[name], *locate_slice(parameter))
        return DTensor.from_local(
            part.to(device, parameter.dtype),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def may_stay_unread(ref: ModelRef, model_config: PretrainedConfig) -> bool:
    """Return whether a model's weights are read by slices: not those that are quantized or of a model with its own code."""
    has_own_code = ref.trust_remote_code and getattr(model_config, "auto_map", None)
    return not is_quantized(model_config) and not has_own_code


def load_unread(
    ref: ModelRef, device: torch.device, dtype: torch.dtype, attn_implementation: str
) -> UnreadWeights | None:
    """Return the model with its weights still in its files, or None where they have to be loaded whole.

    Raises:
        ModelError: as `load_model` says.
    """
    if not may_stay_unread(ref, load_model_config(ref)):
        return None
    model = load_model(ref, device, dtype, attn_implementation, reads_weights=False)
    try:
        source = open_source(ref)
        names = NameMap(model, source.tensors)
    except ModelError as error:
        logger.info("Each worker loads the weights whole: %s", error.message)
        return None
    needed = {name for name, parameter in model.named_parameters()}
    needed |= {name for name, buffer in model.named_buffers() if buffer.is_meta}
    known = {name for group in names.groups for name in group.parameters}
    return UnreadWeights(model, WeightParts(source, names)) if needed <= known else None


def _replace_parameters(
    model: nn.Module, change: Callable[[Tensor, str], Tensor | None]
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Put `change(parameter, path)` in the place of each parameter, the same for those that are shared; None: it stays.

    Returns each parameter that was replaced, and what came in its place.
    """
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for prefix, module in [*model.named_modules()]:
        for last, parameter in [*module.named_parameters(recurse=False)]:
            if id(parameter) not in made:
                changed = change(parameter, f"{prefix}.{last}" if prefix else last)
                if changed is None:
                    continue
                made[id(parameter)] = parameter, nn.Parameter(changed, parameter.requires_grad)
            setattr(module, last, made[id(parameter)][1])
    return [*made.values()]


def _stand_in(parameter: Tensor) -> Tensor:
    return torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
