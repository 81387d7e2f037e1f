"""Texts on which an export is held against what it was made from: rows of the run's own data."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.config import ModelRef
from tunesmith.model.load import load_tokenizer
from tunesmith.runs.identity import recorded_date
from tunesmith.runs.tuned import TunedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_NUM_TEXTS = 8
_MAX_TOKENS = 256
_TEXTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "She has 48 / 2 = 24 apples in the basket, and 24 more in the kitchen, so 72 in all.",
    "def add(a, b):\n    return a + b\n\n\nassert add(2, 3) == 5\n",
    "Dear Sir or Madam, I am writing to ask about the order that I placed on 3 May.",
    "Größe, café, naïve; 你好，世界。 Привет, мир!",
    '{"name": "Ada", "born": 1815, "tags": ["mathematics", "poetry"]}',
    "Once upon a time there was a miller who had three sons, a donkey and a cat.",
    "To be, or not to be, that is the question.",
)


def choose_prompts(tuned: TunedModel, tokenizer_folder: Path) -> list[torch.Tensor]:
    """Return token ids [1, T] of a few rows of the run's test or validation set; of fixed texts without a run.

    Raises:
        ModelError: the folder holds no tokenizer.
    """
    trust = tuned.base is not None and tuned.base.trust_remote_code
    tokenizer = load_tokenizer(ModelRef(tokenizer_folder, None, trust), tokenizer_folder)
    examples = _encode_rows(tuned, tokenizer) or [tokenizer(text)["input_ids"] for text in _TEXTS]
    return [torch.tensor([ids[:_MAX_TOKENS]]) for ids in examples]


def _encode_rows(tuned: TunedModel, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    from tunesmith.data.formats import Findings
    from tunesmith.data.mixture import encode_rows, recorded_formats

    if tuned.params is None or tuned.data_dir is None:
        return []
    for name in ("test", "validation"):
        path = tuned.data_dir / f"{name}.jsonl"
        if path.is_file() and path.stat().st_size:
            with path.open(encoding="utf-8") as file:
                rows = [json.loads(line) for line in islice(file, _NUM_TEXTS)]
            names = tuned.params["data"]["row_format"]
            date = recorded_date(tuned.params)
            formats = [
                it.with_tokenizer(tokenizer, date) for it in recorded_formats(names, tuned.dataset.sources)
            ]
            encoded = encode_rows(formats, rows, Findings())
            return [examples[0].segments[0].input_ids for examples in encoded if examples]
    logger.info("the run's data set is gone, so fixed texts stand in for its prompts")
    return []
