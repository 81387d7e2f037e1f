"""Which tokens of an example are trained, as text to compare."""

from __future__ import annotations

import pickle

from transformers import PreTrainedTokenizerFast

from support.tokenizers import build_tokenizer
from tunesmith.data.examples import Segment


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = pickle.loads(pickle.dumps(build_tokenizer("chatml")))
    tokenizer.chat_template = template
    return tokenizer


def spell(tokenizer: PreTrainedTokenizerFast, example: Segment) -> str:
    """Return the example's text with ⟦ and ⟧ around its trained stretches."""
    text, inside, ids = "", False, []
    for token, trained in zip([*example.input_ids, None], [*example.trained, None], strict=True):
        if trained is not inside:
            text += tokenizer.decode(ids) + ("" if trained is None and not inside else "⟧" if inside else "⟦")
            ids, inside = [], bool(trained)
        ids.append(token)
    return text
