"""What lives while a model runs on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunesmith.compat import storage_key


class AnswersNo(TorchDispatchMode):
    """Answers no where a model asks whether something holds of its tensors: rows hold several examples, and no padding."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_asked = func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta
        if is_asked and args[0].dtype == torch.bool:
            return False
        return func(*args, **(kwargs or {}))


class LiveCounter(AnswersNo):
    """Counts the bytes of the tensors that are made inside and live; views of what was there before are free.

    Of those on the meta device, unless another one is named.
    """

    def __init__(self, before: Iterable[Tensor], device_type: str = "meta") -> None:
        super().__init__()
        self._device_type = device_type
        self.now = self.peak = 0
        self.noted: list[int] = []
        self._is_noting = False
        self._keys = {storage_key(tensor.untyped_storage()) for tensor in before}

    def note_next(self) -> None:
        """Note what lives when the next operation begins: until then a block's input may still be held."""
        self._is_noting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._is_noting:
            self.noted.append(self.now)
            self._is_noting = False
        outputs = super().__torch_dispatch__(func, types, args, kwargs)
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.device.type == self._device_type:
                self._add(output.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_key(storage), storage.nbytes()
        if key in self._keys:
            return
        self._keys.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._keys.remove(key)
        self.now -= size
