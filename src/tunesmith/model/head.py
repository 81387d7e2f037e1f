"""The output layer, whatever PEFT has put around it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from tunesmith.model.adapters.lora import TokenRows, find_token_rows


class Head(NamedTuple):
    """The output layer of a model.

    Attributes:
        module: what the model calls.
        layer: what holds the weight and the bias.
        tokens: those that have rows of their own, in place of the layer's.
    """

    module: Any
    layer: Any
    tokens: TokenRows | None

    @property
    def is_plain(self) -> bool:
        """Whether it is a linear layer without an adapter."""
        return type(self.layer) is nn.Linear

    @property
    def rows(self) -> tuple[Tensor | None, Tensor | None]:
        """The rows in place of the layer's, and which they are, where there are any."""
        if self.tokens is None:
            return None, None
        weight = self.layer.weight
        return self.tokens.rows.to(weight.dtype), self.tokens.ids_on(weight.device)


def find_head(model: Any) -> Head:
    """Return the output layer of `model`; of one that is trained whole beside adapters, the copy that is trained."""
    module = model.get_output_embeddings()
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        (module,) = copies.values()
    tokens = find_token_rows(module)
    return Head(module, module if tokens is None else tokens.layer, tokens)
