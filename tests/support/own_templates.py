"""Chat templates that behave as those of well-known families are documented to, in words of our own.

`OWN_TEMPLATES[name]` has the template, its special tokens, and what it makes of a talk of two questions.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from support.tokenizers import train_byte_bpe

# Turns in ChatML; the last answer has a block of its reasoning, even an empty one, and earlier ones have none. Tools
# are told in the system turn, and their results come as a user's.
QWEN3 = """
{%- macro turn(role, text) %}{{- '<|im_start|>' ~ role ~ '\\n' ~ text ~ '<|im_end|>\\n' }}{%- endmacro %}
{%- set ns = namespace(asked=-1, system='') %}
{%- for m in messages if m.role == 'user' %}{%- set ns.asked = messages.index(m) %}{%- endfor %}
{%- if messages[0].role == 'system' %}{%- set ns.system = messages[0].content %}{%- endif %}
{%- if tools %}
    {%- set listed %}{% for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}{% endset %}
    {{- turn('system', (ns.system ~ '\\n\\n' if ns.system else '') ~ '# Tools\\n\\n<tools>' ~ listed ~ '\\n</tools>') }}
{%- elif ns.system %}
    {{- turn('system', ns.system) }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- turn(m.role, m.content) }}
    {%- elif m.role == 'assistant' %}
        {%- set thought, said = m.reasoning_content or '', m.content or '' %}
        {%- if not thought and '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- set block = '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' if loop.index0 > ns.asked and (loop.last or thought) else '' %}
        {%- set calls %}{% for c in m.tool_calls or [] %}{{ '\\n<tool_call>\\n' ~ (c.function | tojson) ~ '\\n</tool_call>' }}{% endfor %}{% endset %}
        {{- turn('assistant', block ~ said ~ calls) }}
    {%- elif m.role == 'tool' %}
        {{- turn('user', '<tool_response>\\n' ~ m.content ~ '\\n</tool_response>') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# Headers of roles, a system turn with the dates even where nobody wrote one, texts trimmed.
LLAMA3 = """
{{- bos_token }}
{%- macro header(role) %}{{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}{%- endmacro %}
{%- set own = messages[0].content | trim if messages[0].role == 'system' else '' %}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{{- header('system') ~ 'Cutting Knowledge Date: December 2023\\nToday Date: ' }}
{{- strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}
{{- '\\n\\n' ~ own ~ '<|eot_id|>' }}
{%- for m in rest %}
    {{- header('ipython' if m.role == 'tool' else m.role) ~ (m.content | trim) ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- header('assistant') }}{%- endif %}"""

# The assistant is called model, turns alternate, and nobody speaks for the system.
GEMMA2 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n' ~ (m.content | trim) ~ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# As before, but what the system says begins the first question, and a text may be a list of parts.
GEMMA3 = """
{{- bos_token }}
{%- macro words(content) %}
    {%- if content is string %}{{- content | trim }}
    {%- else %}{%- for part in content %}{{- '<start_of_image>' if part.type == 'image' else part.text | trim }}{%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set first = words(messages[0].content) ~ '\\n\\n' if messages[0].role == 'system' else '' %}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- for m in rest %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n' ~ (first if loop.first else '') }}
    {{- words(m.content) ~ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# The prompt opens the block of the reasoning, and finished answers have lost theirs.
DEEPSEEK_R1 = """
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{- m.content }}
    {%- elif m.role == 'user' %}{{- '<｜User｜>' ~ m.content }}
    {%- elif m.role == 'assistant' %}{{- '<｜Assistant｜>' ~ m.content.split('</think>')[-1] ~ '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"""

# No prompt for the answer but the end of the question; what the system says stands before the last question.
MISTRAL = """
{{- bos_token }}
{%- set system = messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '' %}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- for m in rest %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' ~ (system if loop.index0 >= (rest | length) - 2 else '') ~ m.content ~ '[/INST]' }}
    {%- else %}
        {{- ' ' ~ (m.content | trim) ~ eos_token }}
    {%- endif %}
{%- endfor %}"""

# ChatML with a separator of its own, and nothing between the turns.
PHI4 = """
{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '<|im_sep|>' ~ m.content ~ '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"""

SYSTEM, FIRST, ANSWER, SECOND, THOUGHT, LAST = (
    "Be brief.",
    "NAME asks.",
    "5",
    "And 4?",
    "5 and 4",
    "That is 9.",
)
# What stands in the texts below for what differs from row to row, and for the day.
NAME, TODAY = "NAME", "TODAY"


@dataclass(frozen=True)
class OwnTemplate:
    """A family's template, and what it makes of a talk of two questions.

    Attributes:
        special: its tokenizer's special tokens; `eos` and `bos` are those that the tokenizer names.
        end: the token that ends an answer.
        family: of the tiny model that is trained on it.
        prompt: all that a model is given before the last answer; `NAME` and `TODAY` stand for what they say.
        answer: what it is to say, `end` included.
        takes_system: whether a system message is allowed.
        reasons: whether the last answer brings `THOUGHT`.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None
    end: str
    family: str
    prompt: str
    answer: str
    takes_system: bool = True
    reasons: bool = False

    def talk(self, name: str) -> list[dict[str, Any]]:
        """Return the conversation as a row has it."""
        said = [SYSTEM, FIRST.replace(NAME, name), ANSWER, SECOND, LAST]
        roles = ["system", "user", "assistant", "user", "assistant"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        if self.reasons:
            messages[-1]["reasoning_content"] = THOUGHT
        return messages if self.takes_system else messages[1:]

    def prompt_of(self, name: str, date: datetime.date) -> str:
        """Return the prompt of a row's last answer."""
        return self.prompt.replace(NAME, name).replace(TODAY, date.strftime("%d %b %Y"))

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = train_byte_bpe([SYSTEM, FIRST, SECOND, THOUGHT, LAST] * 4, 400)
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.special)})
        tokenizer.eos_token, tokenizer.pad_token = self.eos, self.eos
        if self.bos is not None:
            tokenizer.bos_token = self.bos
        tokenizer.chat_template = self.template
        return tokenizer


_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format
OWN_TEMPLATES = {
    "qwen3": OwnTemplate(
        QWEN3, ("<|im_start|>", "<|im_end|>"), "<|endoftext|>", None, "<|im_end|>", "qwen3",
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{FIRST}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
        f"<|im_start|>user\n{SECOND}<|im_end|>\n<|im_start|>assistant\n",
        f"<think>\n{THOUGHT}\n</think>\n\n{LAST}<|im_end|>",
        reasons=True,
    ),
    "llama3": OwnTemplate(
        LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "llama",
        f"<|begin_of_text|>{_HEADER('system')}Cutting Knowledge Date: December 2023\nToday Date: {TODAY}\n\n"
        f"{SYSTEM}<|eot_id|>{_HEADER('user')}{FIRST}<|eot_id|>{_HEADER('assistant')}{ANSWER}<|eot_id|>"
        f"{_HEADER('user')}{SECOND}<|eot_id|>{_HEADER('assistant')}",
        f"{LAST}<|eot_id|>",
    ),
    "gemma2": OwnTemplate(
        GEMMA2, ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<|endoftext|>", "<bos>", "<end_of_turn>", "gemma",
        f"<bos><start_of_turn>user\n{FIRST}<end_of_turn>\n<start_of_turn>model\n{ANSWER}<end_of_turn>\n"
        f"<start_of_turn>user\n{SECOND}<end_of_turn>\n<start_of_turn>model\n",
        f"{LAST}<end_of_turn>",
        takes_system=False,
    ),
    "gemma3": OwnTemplate(
        GEMMA3, ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<|endoftext|>", "<bos>", "<end_of_turn>", "gemma",
        f"<bos><start_of_turn>user\n{SYSTEM}\n\n{FIRST}<end_of_turn>\n<start_of_turn>model\n{ANSWER}<end_of_turn>\n"
        f"<start_of_turn>user\n{SECOND}<end_of_turn>\n<start_of_turn>model\n",
        f"{LAST}<end_of_turn>",
    ),
    "deepseek_r1": OwnTemplate(
        DEEPSEEK_R1, ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "llama",
        f"<｜begin▁of▁sentence｜>{SYSTEM}<｜User｜>{FIRST}<｜Assistant｜>{ANSWER}<｜end▁of▁sentence｜>"
        f"<｜User｜>{SECOND}<｜Assistant｜><think>\n",
        f"{THOUGHT}\n</think>\n\n{LAST}<｜end▁of▁sentence｜>",
        reasons=True,
    ),
    "mistral": OwnTemplate(
        MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>", "</s>", "mistral",
        f"<s>[INST] {FIRST}[/INST] {ANSWER}</s>[INST] {SYSTEM}\n\n{SECOND}[/INST]",
        f" {LAST}</s>",
    ),
    "phi4": OwnTemplate(
        PHI4, ("<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|endoftext|>", None, "<|im_end|>", "phi3",
        f"<|im_start|>system<|im_sep|>{SYSTEM}<|im_end|><|im_start|>user<|im_sep|>{FIRST}<|im_end|>"
        f"<|im_start|>assistant<|im_sep|>{ANSWER}<|im_end|><|im_start|>user<|im_sep|>{SECOND}<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
        f"{LAST}<|im_end|>",
    ),
}  # fmt: skip
