"""Rows of embeddings and head for tokens that a model didn't have."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


def grow_embeddings(model: Any, num_rows: int) -> None:
    """Give embeddings and head at least `num_rows` rows; those that are added begin as the mean of the old ones.

    Raises:
        ModelError: transformers can't resize this model.
    """
    num_before = len(model.get_input_embeddings().weight)
    if num_rows <= num_before:
        return  # the vocabulary is padded, and has room
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.resize_token_embeddings(num_rows, mean_resizing=False)
    except (NotImplementedError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(
            f"the embeddings of a `{model.config.model_type}` model can't be given rows for new tokens: {error}",
            "name tokens for which its vocabulary has room, or leave --new_tokens out",
        ) from error
    begin_as_mean(model, range(num_before, num_rows), num_before)


@torch.no_grad()
def begin_as_mean(model: Any, ids: Iterable[int], num_before: int) -> None:
    """Put the mean of the first `num_before` rows of embeddings and head into the rows `ids`."""
    rows = torch.tensor([*ids])
    layers: list[nn.Module] = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = [getattr(layer, name, None) for layer in layers for name in ("weight", "bias")]
    for parameter in {id(it): it for it in found if it is not None}.values():
        mean = parameter[:num_before].mean(0, dtype=torch.float32)
        parameter[rows.to(parameter.device)] = mean.to(parameter.dtype)
