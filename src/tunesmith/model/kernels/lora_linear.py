"""Linear layers and their LoRA adapters as one product, of which the frozen weights cost nothing but theirs.

Layers that are handed one tensor multiply it by their A at once, and their input's gradients add up in one buffer.

Shapes: N positions, D inputs, O outputs, R rank, S ranks of a group's layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.compat import count_changes, reshape_own
from tunesmith.model.adapters.lora import find_plain_adapter, find_token_rows
from tunesmith.model.frozen_weights import FrozenWeight, weight_of
from tunesmith.model.kernels.dropout import Dropout, add_dropped, drop, find_dropout, make_layer_key
from tunesmith.model.kernels.recompute import CheapResults, Recipe


def fuse_adapters(
    model: nn.Module,
    results: CheapResults,
    packs_masks: bool,
    groups: Iterable[Sequence[str]] = (),
    adapters_first: bool = False,
) -> None:
    """Let every adapted linear layer of `model` compute with its adapter at once, in the dtype of its input.

    What their dropout drops follows from their number among them. `packs_masks`: masks that don't are kept as bits,
    else as bools. `groups` are the names of layers that are handed the same tensor, in the order in which they are
    called: they are computed together, with one dropout, the first one's. `adapters_first`: the weight is multiplied
    into what the adapter gives.
    """
    handed = _Handed()
    fused: dict[str, _AdaptedLinear] = {}
    for name, module in model.named_modules():
        adapter = find_plain_adapter(module)
        if adapter is not None:
            key = make_layer_key(len(fused))
            fused[name] = _AdaptedLinear(module, adapter, key, results, packs_masks, adapters_first, handed)
            # Bound methods survive a copy of the model, and compiled code can be shared by layers.
            module.forward = fused[name].forward
    for names in groups:
        group = [fused[name] for name in names]
        for place, layer in enumerate(group):
            layer.group, layer.place = group, place


def trains_plain_adapters_alone(model: nn.Module) -> bool:
    """Return whether all that is trained lies in layers that `fuse_adapters` fuses, or is rows for tokens.

    Both are cast to the dtype of the products where they are used.
    """
    fused = {
        id(parameter)
        for module in model.modules()
        if find_plain_adapter(module) is not None
        for parameter in module.parameters()
    }
    fused |= {
        id(tokens.rows) for module in model.modules() if (tokens := find_token_rows(module)) is not None
    }
    return all(id(parameter) in fused for parameter in model.parameters() if parameter.requires_grad)


class _Handed:
    """What the first layer of a group has computed for the others: no more than one group's at a time."""

    def __init__(self) -> None:
        self._group: list[_AdaptedLinear] = []
        self._inputs: Tensor | None = None
        self._num_changes = 0
        self._has_graph = False
        self._outputs: list[Tensor | None] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handed:
        # Of a copied model: outputs are not of its tensors.
        return _Handed()

    def put(self, group: list[_AdaptedLinear], inputs: Tensor, outputs: Sequence[Tensor]) -> None:
        self._group, self._inputs, self._num_changes = group, inputs, _count_changes(inputs)
        self._has_graph, self._outputs = torch.is_grad_enabled(), [None, *outputs[1:]]

    def take(self, group: list[_AdaptedLinear], place: int, inputs: Tensor) -> Tensor | None:
        """Return what is there for the layer at `place`, if it is of these very inputs; with the last all is let go of."""
        if inputs is not self._inputs or group is not self._group:
            return None
        is_same = _count_changes(inputs) == self._num_changes and torch.is_grad_enabled() == self._has_graph
        output = self._outputs[place] if is_same else None
        self._outputs[place] = None
        if all(other is None for other in self._outputs):
            self._group, self._inputs, self._outputs = [], None, []
        return output


@dataclass(eq=False)
class _AdaptedLinear:
    """A layer of PEFT's that is computed at once with the adapter called `adapter`, where that alone is active.

    The first of a `group` computes all of its layers.
    """

    layer: Any
    adapter: str
    key: Tensor
    results: CheapResults
    packs_masks: bool
    adapters_first: bool
    handed: _Handed
    group: list[_AdaptedLinear] = field(default_factory=list)
    place: int = 0

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.is_alone:
            output: Tensor = type(self.layer).forward(self.layer, inputs, *args, **kwargs)
            return output
        if self.place > 0:
            ready = self.handed.take(self.group, self.place, inputs)
            return self._compute(inputs, [self])[0] if ready is None else ready
        if not self.group or not self._can_hand_on(inputs):
            return self._compute(inputs, [self])[0]
        outputs = self._compute(inputs, self.group)
        self.handed.put(self.group, inputs, outputs)
        return outputs[0]

    @property
    def is_alone(self) -> bool:
        """Whether nothing but this adapter changes the layer."""
        layer = self.layer
        return not layer.disable_adapters and not layer.merged and layer.active_adapters == [self.adapter]

    @property
    def share(self) -> float:
        """How much of the adapter's input dropout drops."""
        dropout = self.layer.lora_dropout[self.adapter]
        return dropout.p if self.layer.training and isinstance(dropout, nn.Dropout) else 0.0

    def _can_hand_on(self, inputs: Tensor) -> bool:
        # Changes of inference tensors aren't counted.
        is_counted = torch.compiler.is_compiling() or not inputs.is_inference()
        return is_counted and all(other.is_alone and other.share == self.share for other in self.group)

    def _compute(self, inputs: Tensor, group: list[_AdaptedLinear]) -> tuple[Tensor, ...]:
        share = self.share
        dropout = find_dropout(inputs, share, self.key, self.packs_masks) if share else None
        recipe, sources = self.results.find(inputs)
        layers, names = [each.layer for each in group], [each.adapter for each in group]
        outputs: tuple[Tensor, ...] = _LoraLinears.apply(
            inputs,
            recipe,
            sources,
            [weight_of(layer.base_layer) for layer in layers],
            [layer.base_layer.bias for layer in layers],
            # What dropout divides by is divided by here, where it costs nothing.
            [layer.scaling[name] / (1 - share) for layer, name in zip(layers, names, strict=True)],
            dropout,
            share,
            self.adapters_first,
            *(layer.lora_A[name].weight for layer, name in zip(layers, names, strict=True)),
            *(layer.lora_B[name].weight for layer, name in zip(layers, names, strict=True)),
        )
        return outputs


class _LoraLinears(torch.autograd.Function):
    """inputs @ weight.T + bias + scaling · dropout(inputs) @ a.T @ b.T of each layer, in the dtype of the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        recipe: Recipe | None,
        sources: list[Tensor],
        weights: list[FrozenWeight],
        biases: list[Tensor | None],
        scalings: list[float],
        dropout: Dropout | None,
        share: float,
        adapters_first: bool,
        *adapters: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs_ND = inputs.flatten(0, -2)
        a_SD = _stack([a_RD.to(inputs.dtype) for a_RD in adapters[: len(weights)]])
        matrices_OR = [b_OR.to(inputs.dtype) for b_OR in adapters[len(weights) :]]
        ranks = [b_OR.shape[1] for b_OR in matrices_OR]
        # Positions last: products along them are faster on CPUs.
        inner_SN = a_SD @ drop(inputs_ND, dropout.draw(inputs_ND, share) if dropout else None).T
        outputs = []
        for weight, bias_O, scaling, inner_RN, b_OR in zip(
            weights, biases, scalings, inner_SN.split(ranks), matrices_OR, strict=True
        ):
            if adapters_first:
                outputs_NO = _multiply(inner_RN.T, b_OR.T, scaling, bias_O)
                weight.add_linear(outputs_NO, inputs_ND)
            else:
                outputs_NO = weight.linear(inputs_ND, bias_O).addmm_(inner_RN.T, b_OR.T, alpha=scaling)
            # No view: models add to what their layers return.
            outputs.append(reshape_own(outputs_NO, (*inputs.shape[:-1], len(b_OR))))
        stored = [tensor for weight in weights for tensor in weight]
        drawn = [*(dropout or ())]
        ctx.save_for_backward(a_SD, inner_SN, *drawn, *matrices_OR, *stored, *sources)
        ctx.set_materialize_grads(False)
        ctx.kinds, ctx.recipe, ctx.scalings = [type(weight) for weight in weights], recipe, scalings
        ctx.dropout, ctx.num_drawn, ctx.share = type(dropout), len(drawn), share
        ctx.adapters_first = adapters_first
        ctx.dtype = adapters[0].dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(gradient is None for gradient in gradients):
            return (None,) * (9 + 2 * len(gradients))
        a_SD, inner_SN, *tensors = ctx.saved_tensors
        drawn, tensors = tensors[: ctx.num_drawn], tensors[ctx.num_drawn :]
        matrices_OR, tensors = tensors[: len(gradients)], tensors[len(gradients) :]
        inners_RN = inner_SN.split([b_OR.shape[1] for b_OR in matrices_OR])
        gradients_RN: list[Tensor] = []
        gradients_b: list[Tensor | None] = []
        upstream: list[tuple[FrozenWeight, Tensor]] = []
        for gradient, kind, scaling, inner_RN, b_OR in zip(
            gradients, ctx.kinds, ctx.scalings, inners_RN, matrices_OR, strict=True
        ):
            num_stored = len(kind._fields)
            weight, tensors = kind(*tensors[:num_stored]), tensors[num_stored:]
            if gradient is None:  # nothing was made of this layer's output
                gradients_RN.append(torch.zeros_like(inner_RN))
                gradients_b.append(None)
                continue
            gradient_NO = gradient.flatten(0, -2)
            gradients_RN.append((b_OR.T @ gradient_NO.T).mul_(scaling))
            gradients_b.append((inner_RN @ gradient_NO).mul_(scaling).T.to(ctx.dtype))
            upstream.append((weight, gradient_NO))
        gradient_SN = _stack(gradients_RN)
        inputs = ctx.recipe.compute(*tensors) if ctx.recipe else tensors[0]
        inputs_ND = inputs.flatten(0, -2)
        kept = ctx.dropout(*drawn).draw(inputs_ND, ctx.share) if drawn else None
        gradient_a_SD = (gradient_SN @ drop(inputs_ND, kept)).to(ctx.dtype)
        gradients_a = [
            None if gradient is None else gradient_RD
            for gradient, gradient_RD in zip(
                gradients, gradient_a_SD.split([len(inner) for inner in inners_RN]), strict=True
            )
        ]
        gradient_inputs = None
        if ctx.needs_input_grad[0]:
            gradient_ND = _add_up(upstream, gradient_SN, a_SD, kept, ctx.adapters_first)
            gradient_inputs = gradient_ND.view_as(inputs)
        return gradient_inputs, *[None] * 8, *gradients_a, *gradients_b


def _add_up(
    upstream: list[tuple[FrozenWeight, Tensor]],
    gradient_SN: Tensor,
    a_SD: Tensor,
    kept: Tensor | None,
    adapters_first: bool,
) -> Tensor:
    """Return the gradient of the inputs, (N, D): what comes through the weights, and through the adapters."""
    if adapters_first:
        total_ND = drop(gradient_SN.T @ a_SD, kept)
        for weight, gradient_NO in upstream:
            weight.add_input_gradient(total_ND, gradient_NO)
        return total_ND
    (first, gradient_NO), *others = upstream
    total_ND = first.input_gradient(gradient_NO)
    for weight, gradient_NO in others:
        weight.add_input_gradient(total_ND, gradient_NO)
    if kept is None:
        return total_ND.addmm_(gradient_SN.T, a_SD)
    add_dropped(total_ND, gradient_SN.T @ a_SD, kept)
    return total_ND


def _multiply(left: Tensor, right: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """Return scaling · left @ right + bias."""
    if bias is None:
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)
    return torch.addmm(bias, left, right, alpha=scaling)


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _count_changes(tensor: Tensor) -> int:
    # A compiler can't branch on it: there it counts that the layers shared their input when they were tried.
    return 0 if torch.compiler.is_compiling() else count_changes(tensor)
