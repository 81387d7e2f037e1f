"""What is private in Ray, torch, transformers and PEFT and yet needed: a function each, with the versions it is known in.

Nothing else in the package touches these. `tests/test_compat.py` says for each whether the installed version still has
it. The libraries are imported where they are used.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch import Tensor, nn


def block_classes(module: nn.Module) -> set[str]:
    """Return the class names of a model's repeated blocks; of a module that isn't a model, none.

    `_no_split_modules`: transformers 5.19, a list, a set or None.
    """
    return set(getattr(module, "_no_split_modules", None) or ())


def attention_name(model: Any) -> str:
    """Return transformers' name of the attention backend that `model` uses.

    `config._attn_implementation`: transformers 5.19.
    """
    return str(model.config._attn_implementation)


def can_set_attention(model: Any) -> bool:
    """Return whether a transformers model takes its attention backend by name.

    `_can_set_attn_implementation`: transformers 5.19.
    """
    return bool(model._can_set_attn_implementation())


def supports_sdpa(model: Any) -> bool:
    """Return whether a transformers model can attend with torch's SDPA.

    `_supports_sdpa`: transformers 5.19.
    """
    return bool(model._supports_sdpa)


def supports_flash_attention(model: Any) -> bool:
    """Return whether a transformers model can attend with FlashAttention 2, and not with kernels of its own alone.

    `_supports_flash_attn`, `_compatible_flash_implementations`: transformers 5.19.
    """
    own = getattr(model, "_compatible_flash_implementations", None)
    return bool(model._supports_flash_attn) and (own is None or "flash_attention_2" in own)


def eager_attention(module: Any) -> Any:
    """Return the function that attends for `module` where no backend is named; None: it doesn't take backends by name.

    `eager_attention_forward` in the module's file, or that of a class it is made from: transformers 5.19.
    """
    name = "eager_attention_forward"
    found = (getattr(sys.modules.get(kind.__module__), name, None) for kind in type(module).__mro__)
    return next((attend for attend in found if attend is not None), None)


def compute_buffers(model: Any) -> None:
    """Compute, on the CPU, the buffers that no file holds, of a transformers model that was loaded to the meta device.

    As `from_pretrained` does; parameters stay as they are. `named_non_persistent_buffers`, `initialize_weights` and
    the flag `_is_hf_initialized`: transformers 5.19.
    """
    import torch

    for name, buffer in [*model.named_non_persistent_buffers()]:
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, last, torch.empty_like(buffer, device="cpu"))
        module._is_hf_initialized = False
    model.initialize_weights()


def names_of_experts(model: Any) -> frozenset[str]:
    """Return the names of layers that PEFT takes for those of a model's stacked experts, whatever else is called so.

    `_MODEL_TO_CONVERSION_PATTERN`, `_MOE_FUSED_TARGETS`, `_MOE_TARGET_MODULE_MAPPING`: peft 0.21.
    """
    from peft.utils import transformers_weight_conversion as conversion

    kind = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    return frozenset(
        conversion._MOE_TARGET_MODULE_MAPPING[kind] if kind in conversion._MOE_FUSED_TARGETS else ()
    )


def softmax_gradient(gradient: Tensor, probabilities: Tensor) -> Tensor:
    """Return the gradient of a softmax's input over the last dimension, in one pass.

    `torch._softmax_backward_data`: torch 2.13.
    """
    import torch

    return torch._softmax_backward_data(gradient, probabilities, -1, probabilities.dtype)


def reshape_own(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor that nothing else holds in another shape, not as a view: whoever gets it may change it in place.

    `aten._unsafe_view`: torch 2.13.
    """
    import torch

    reshaped: Tensor = torch.ops.aten._unsafe_view(tensor, shape)
    return reshaped


def has_bfloat16_instructions() -> bool:
    """Return whether this machine's CPU multiplies in bfloat16.

    `torch.cpu._is_avx512_bf16_supported`: torch 2.13.
    """
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported())


def set_most_variants(count: int) -> None:
    """Let torch.compile make so many variants of one function before it gives up.

    `torch._dynamo.config.recompile_limit`: torch 2.13.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = count


def let_segments_grow() -> None:
    """Let CUDA's allocator widen the segments that it has, instead of leaving gaps between those of other sizes.

    From now on: it may have begun. `_C._accelerator_setAllocatorSettings`: torch 2.11 and 2.13.
    """
    import torch

    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def compilation_error() -> type[Exception]:
    """Return what torch.compile raises where it can't trace or compile a function.

    `torch._dynamo.exc.TorchDynamoException`: torch 2.13.
    """
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Let the ranks of a process group that is there wait for one another so long.

    `torch.distributed.distributed_c10d._set_pg_timeout`: torch 2.11 and 2.13.
    """
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timeout, group)


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return what tells a storage that lives from all others, without data too.

    `_cdata`: torch 2.13.
    """
    return int(storage._cdata)


def count_changes(tensor: Tensor) -> int:
    """Return how often a tensor, or what it is a view of, was changed in place.

    `_version`: torch 2.13; inference tensors have none.
    """
    return tensor._version


def apply_to_tensors(module: nn.Module, change: Any) -> None:
    """Put `change(tensor)` in the place of each parameter and buffer.

    `Module._apply`: torch 2.13.
    """
    module._apply(change)


def locate_slice(sharded: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of a DTensor's slice on this rank, and where in the whole it begins.

    `torch.distributed.tensor._utils.compute_local_shape_and_global_offset`: torch 2.13.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)


def stays_gathered(module: Any) -> bool:
    """Return whether FSDP leaves a module's weights whole after its forward pass.

    `_get_fsdp_state`, `_fsdp_param_group` and its `_reshard_after_forward`: torch 2.11, 2.13.
    """
    group = module._get_fsdp_state()._fsdp_param_group
    return group is not None and not group._reshard_after_forward


def trainer_without_cleaner() -> Any:
    """Return Ray's TorchTrainer without the process that gives back the workers' places when the controller dies.

    A Ray of our own ends with its driver anyway. That process asks the dashboard of the cluster last started on this
    machine whether our controller lives: no answer holds up the run's end, a false one ends the run.

    `_create_default_callbacks`, `PlacementGroupCleanerCallback`: ray 2.60.
    """
    from ray.train.torch import TorchTrainer

    class OwnRayTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [it for it in callbacks if type(it).__name__ != "PlacementGroupCleanerCallback"]

    return OwnRayTrainer
