"""Whether a model knows the tokens that its tokenizer makes of the data: it has embeddings for so many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tunesmith.data.token_set import TokenSet
from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def count_known_tokens(model: PreTrainedModel) -> int:
    """Return how many tokens the model has embeddings for; it may be on the meta device."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_data_tokens(
    sets: Iterable[TokenSet | None], tokenizer: PreTrainedTokenizerFast, num_known: int, called: str
) -> None:
    """Refuse prepared data with tokens that the model, `called` so, has no embedding for.

    A tokenizer may have more tokens than the model if the data don't use them.

    Raises:
        ModelError: it names a token, and how many examples have such ones.
    """
    if not has_unknown(tokenizer, num_known):
        return
    for tokens in sets:
        beyond = tokens.find_beyond(num_known) if tokens is not None else None
        if beyond is not None:
            number = f"{beyond.num_examples:,} example{'' if beyond.num_examples == 1 else 's'}"
            raise _unknown(tokenizer, beyond.token, num_known, called, f"the data, in {number}")
    # What rows are filled up with, where they are.
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id >= num_known:
        raise _unknown(tokenizer, int(tokenizer.eos_token_id), num_known, called, "each answer, as its end")


def check_prompt_tokens(
    prompts: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerFast, num_known: int, called: str
) -> None:
    """Refuse prompts with tokens that the model, `called` so, has no embedding for.

    Raises:
        ModelError: it names a token, and how many prompts have such ones.
    """
    if not has_unknown(tokenizer, num_known):
        return
    beyond = [[token for token in prompt if token >= num_known] for prompt in prompts]
    if found := [tokens for tokens in beyond if tokens]:
        number = f"{len(found):,} prompt{'' if len(found) == 1 else 's'}"
        raise _unknown(tokenizer, min(map(min, found)), num_known, called, f"the test set, in {number}")


def has_unknown(tokenizer: PreTrainedTokenizerFast, num_known: int) -> bool:
    """Tell whether the tokenizer has tokens that a model of so many lacks."""
    return max(tokenizer.get_vocab().values(), default=0) >= num_known


def _unknown(
    tokenizer: PreTrainedTokenizerFast, token: int, num_known: int, called: str, where: str
) -> ModelError:
    text = tokenizer.convert_ids_to_tokens(token)
    return ModelError(
        f"the tokenizer's token {token:,}, `{text}`, is in {where}, and `{called}` has embeddings for "
        f"{num_known:,} tokens (0 to {num_known - 1:,})",
        "take the tokenizer that belongs to the model, or grow the model's embeddings by the tokens that it lacks",
    )
