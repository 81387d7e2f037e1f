"""Results that cost less to compute twice than to keep: the backward pass computes them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tunesmith.compat import count_changes


class CheapResults:
    """The cheap results of one model that are alive: the layers that take one keep what it was computed from instead.

    A model's own code hands a norm's result on to layers of ours, as a plain tensor. So this remembers, as long as
    the tensor lives and no longer, how it was made.
    """

    def __init__(self, are_kept: bool) -> None:
        self._are_kept = are_kept
        self._recipes = WeakTensorKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> CheapResults:
        # Of a copied model: results are not of its tensors.
        return CheapResults(self._are_kept)

    def compute(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return `function(*tensors)`, of which the layers that take it keep nothing but `tensors`.

        The backward pass computes it again, once for all its layers.
        """
        result = function(*tensors)
        # A compiler decides for itself what is kept.
        if not (self._are_kept or torch.compiler.is_compiling()) and torch.is_grad_enabled():
            sources = [tensor.detach() for tensor in tensors]
            self._recipes[result] = Recipe(function), sources, count_changes(result)
        return result

    def find(self, tensor: Tensor) -> tuple[Recipe | None, list[Tensor]]:
        """Return how `tensor` is computed again, and what from; None, and itself, if it is to be kept."""
        if not (self._are_kept or torch.compiler.is_compiling()):
            recipe, sources, num_changes = self._recipes.get(tensor, (None, [], 0))
            # Else it was changed in place.
            if recipe is not None and count_changes(tensor) == num_changes:
                recipe.num_waiting += 1
                return recipe, sources
        return None, [tensor]


class Recipe:
    """Computes again what several layers take."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.num_waiting = 0
        self._function = function
        self._result: Tensor | None = None

    def compute(self, *tensors: Tensor) -> Tensor:
        """Return the result for one of those that wait for it; it is let go of with the last."""
        result = self._function(*tensors) if self._result is None else self._result
        self.num_waiting -= 1
        self._result = result if self.num_waiting > 0 else None
        return result
