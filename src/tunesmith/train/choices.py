"""What is chosen where the settings leave a choice: found here, and recorded, so that a resumed run keeps it."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from tunesmith.config import TrainConfig
from tunesmith.errors import ModelError, ResourceError
from tunesmith.model.attention_choice import EAGER, SDPA
from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.kernels.install import Kernels, kernels_for
from tunesmith.model.load import attention_of, resolve_dtype
from tunesmith.model.probe import keeps_examples_apart
from tunesmith.parallel.activation_checkpointing import count_recomputed, describe_recomputation
from tunesmith.parallel.fsdp import HYBRID, name_sharding
from tunesmith.parallel.mesh import Mesh
from tunesmith.runs.folder import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choices:
    """How an attempt computes, as `params.json` says it under `resolved`."""

    dtype: str
    attn_implementation: str
    gradient_checkpointing: str
    fsdp: str
    num_workers: int
    use_gpu: bool
    groups_adapters: bool


def keep_recorded(
    config: TrainConfig, recorded: dict[str, Any] | None, mesh: Mesh, use_gpu: bool
) -> TrainConfig:
    """Return the settings with the dtype that the run was started in, where they leave it open.

    And with where the weights lay, if the number of workers is the same: how gradients are added up follows. (Not
    within nodes that now have unequal numbers.) And with SDPA or eager attention, if the run attends so on such
    devices: before there was a choice, models that cap their scores attended with SDPA, and before `varlen` knew
    windows, models with those attended with either.
    `recorded` are the choices of the attempt before, None at a run's first.
    """
    if recorded is None:
        return config
    kept = {"dtype": recorded["dtype"]}
    may_lie_so = recorded["fsdp"] != HYBRID or not mesh.unequal_nodes
    if recorded["num_workers"] == mesh.size and may_lie_so:
        kept["fsdp"] = recorded["fsdp"]
    if recorded["attn_implementation"] in (SDPA, EAGER) and recorded["use_gpu"] == use_gpu:
        kept["attn_implementation"] = recorded["attn_implementation"]
    return config.model_copy(update={name: c for name, c in kept.items() if getattr(config, name) == "auto"})


def check_sharding(config: TrainConfig, mesh: Mesh) -> None:
    """Refuse to shard the weights within nodes that can't hold the same.

    Raises:
        ResourceError: it names the setting.
    """
    if config.fsdp == HYBRID and mesh.unequal_nodes:
        raise ResourceError(
            f"`fsdp` is `{HYBRID}`, but {mesh.unequal_nodes}",
            "ask for as many workers as fill whole nodes, or set `fsdp` to `full_shard`",
        )


def choose_packing(
    config: TrainConfig, recorded: bool | None, model: nn.Module, mesh: Mesh, device: torch.device
) -> bool:
    """Return whether sequences are packed: as the run recorded, else if asked for and the model is fit for it.

    Collective.

    Raises:
        ModelError: it isn't, and its examples were cut for packs.
    """
    if recorded is not None:
        return recorded
    if not config.packing:
        return False
    is_fit = attention_of(model) == VARLEN or keeps_examples_apart(
        model, device, resolve_dtype(config.dtype, device)
    )
    (num_unfit,) = mesh.sum([float(not is_fit)])
    if num_unfit and config.concatenate:
        raise ModelError(
            f"`{config.model.source}` lets packed examples see one another, and concatenate is for packs alone",
            "set concatenate false: it is trained padded then, one example a sequence",
        )
    if num_unfit:
        logger.warning(
            "`%s` lets packed examples see one another, so it is trained padded: one example a sequence",
            config.model.source,
        )
    return num_unfit == 0


def choose_kernels(recorded: dict[str, Any] | None, device_type: str) -> Kernels:
    """Return how the model computes: its adapters in groups only if they were so when the run was started.

    `recorded` as for `keep_recorded`; before there were groups, nothing was.
    """
    kernels = kernels_for(device_type)
    if recorded is None:
        return kernels
    return replace(kernels, groups_adapters=recorded.get("groups_adapters", False))


def find_choices(
    config: TrainConfig, model: nn.Module, mesh: Mesh, device: torch.device, kernels: Kernels
) -> Choices:
    """Return how the model that was built, with these kernels, computes."""
    return Choices(
        dtype=str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
        attn_implementation=attention_of(model),
        gradient_checkpointing=describe_recomputation(*count_recomputed(model)),
        fsdp=name_sharding(model),
        num_workers=mesh.size,
        use_gpu=device.type == "cuda",
        groups_adapters=kernels.groups_adapters,
    )


def record_choices(run: RunDir, packing: bool, choices: Choices) -> None:
    """Write them into the run's `params.json`. Rank 0 only."""
    run.write_params({**run.read_params(), "packing": packing, "resolved": asdict(choices)})
