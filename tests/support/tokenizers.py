"""Real tokenizers of the kinds that language models ship with, made on the spot from a few lines; always the same.

`build_tokenizer(kind)` gives one of `TOKENIZER_KINDS`. `save_pretrained` writes one to a folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from support.paths import REPOSITORY

TOKENIZER_KINDS = ("byte_bpe", "llama2", "unigram", "wordpiece", "chatml", "qwen3", "smollm2")

# What `make model` puts there.
_SMOLLM2 = REPOSITORY / "examples/quickstart/build/SmolLM2-135M-Instruct"

CHATML_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# As Qwen3's: the assistant's turn after the last question has a think block, earlier ones have none.
QWEN3_TEMPLATE = """{%- set last = namespace(query=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set last.query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant'] %}{{- raise_exception('unknown role ' + message.role) }}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.index0 > last.query %}
{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

_CORPUS = [
    "### Instruction:\nWhat is the capital of France?\n ### Input:\n\n### Response:\nThe capital is Paris.",
    "How many apples does she have in all? She has 48 / 2 = 24 apples, and 24 more, so 72 in total.",
    "def add(a, b):\n    return a + b\n\n\nThe quick brown fox jumps over the lazy dog, again and again.",
    "Größe, café, naïve, señor; 你好，世界。 Привет, мир! 👋🏽 é ñ ü ß … — “quoted”",
    "user assistant system question answer because there would which their about people time",
]


@lru_cache
def build_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of this kind; the same object each time. SmolLM2's own is skipped where it isn't."""
    return _BUILDERS[kind]()


def _byte_bpe_backend(special: list[str], corpus: Iterable[str] = (), vocab_size: int = 512) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus or _CORPUS * 4, trainer)
    return backend


def _smollm2() -> PreTrainedTokenizerFast:
    if not _SMOLLM2.is_dir():
        pytest.skip("SmolLM2 is not there: `make model` gets it")
    return PreTrainedTokenizerFast.from_pretrained(_SMOLLM2)


def _byte_bpe() -> PreTrainedTokenizerFast:
    """GPT-2's and SmolLM2's kind: bytes, no BOS, white space trimmed from offsets."""
    return train_byte_bpe(_CORPUS * 4, 512)


def train_byte_bpe(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer trained on `corpus`."""
    backend = _byte_bpe_backend(["<|endoftext|>"], corpus, vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def _llama2() -> PreTrainedTokenizerFast:
    """Llama 2's kind: ▁ for spaces and before the text, bytes for unknown characters, BOS added."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    ascii_words = [word for line in _CORPUS if line.isascii() for word in line.split("\n")]
    trained.train_from_iterator(ascii_words * 4, trainer)
    # Training marks every special token as such; the bytes of a real model are ordinary tokens.
    backend = Tokenizer(trained.model)
    backend.normalizer = trained.normalizer
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def _unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram: NFKC, ▁ before the text, and an end token that the tokenizer adds itself."""
    # Not trained: the trainer's sums depend on the order of its threads.
    pieces = sorted({f"▁{word}" for line in _CORPUS for word in line.split()})
    characters = sorted({"▁", *"".join(_CORPUS), *map(chr, range(32, 127))} - {" "})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(piece, -6.0) for piece in pieces] + [
        (character, -9.0) for character in characters if character not in pieces
    ]
    backend = Tokenizer(models.Unigram(vocab, unk_id=2))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def _wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, white space lost, tokens added on both sides."""
    # Not trained: the trainer numbers pieces in an order that changes from process to process.
    lowered = "\n".join(_CORPUS).lower()
    characters = sorted({*lowered, *map(chr, range(33, 127))} - {" ", "\n"})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(re.findall(r"[a-z]{2,}", lowered)))]
    pieces += [*characters, *(f"##{character}" for character in characters)]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
    )


def _chat(template: str) -> PreTrainedTokenizerFast:
    backend = _byte_bpe_backend(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


_BUILDERS = {
    "byte_bpe": _byte_bpe,
    "llama2": _llama2,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "chatml": lambda: _chat(CHATML_TEMPLATE),
    "qwen3": lambda: _chat(QWEN3_TEMPLATE),
    "smollm2": _smollm2,
}
