"""Rows of their own for a few tokens, in embeddings and head, at the cost of those rows.

PEFT copies the whole matrix in every forward pass, and makes a whole gradient of it.

Shapes: B sequences, T tokens, D model width, V vocabulary, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.adapters.lora import TokenRows, find_token_rows


def install_token_rows(model: nn.Module) -> None:
    """Let embeddings and head of `model` take their trained rows as below."""
    for module in model.modules():
        tokens = find_token_rows(module)
        if tokens is None or getattr(tokens.layer, "bias", None) is not None:
            continue
        kind = _Embedding if isinstance(tokens.layer, nn.Embedding) else _Linear
        module.forward = kind(module, tokens).forward


@dataclass
class _Embedding:
    wrapper: Any
    tokens: TokenRows

    def forward(self, ids_BT: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.wrapper.disable_adapters:
            output: Tensor = type(self.wrapper).forward(self.wrapper, ids_BT, *args, **kwargs)
            return output
        layer = self.tokens.layer
        hidden_BTD: Tensor = layer(ids_BT)
        sorted_R, order_R = self.tokens.ids_on(ids_BT.device).sort()
        places_BT = torch.searchsorted(sorted_R, ids_BT).clamp_(max=len(sorted_R) - 1)
        own_BTD = F.embedding(order_R[places_BT], self.tokens.rows.to(layer.weight.dtype))
        scale = getattr(layer, "embed_scale", None)  # of Gemma 3's embeddings
        if scale is not None:
            own_BTD = own_BTD * torch.as_tensor(scale).to(own_BTD)
        return torch.where(
            (sorted_R[places_BT] == ids_BT).unsqueeze(-1), own_BTD.to(hidden_BTD.dtype), hidden_BTD
        )


@dataclass
class _Linear:
    wrapper: Any
    tokens: TokenRows

    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.wrapper.disable_adapters:
            output: Tensor = type(self.wrapper).forward(self.wrapper, hidden_BTD, *args, **kwargs)
            return output
        layer = self.tokens.layer
        logits_BTV: Tensor = layer(hidden_BTD)
        own_BTR = F.linear(hidden_BTD, self.tokens.rows.to(layer.weight.dtype))
        return logits_BTV.index_copy(-1, self.tokens.ids_on(hidden_BTD.device), own_BTR)
