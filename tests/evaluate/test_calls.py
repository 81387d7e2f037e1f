"""Tool calls in every form that models write: read, and compared by name and arguments."""

from __future__ import annotations

import pytest

from tunesmith.evaluate.metrics.calls import match_calls, parse_calls
from tunesmith.evaluate.metrics.score import choose_metrics

ULM = '{"city": "Ulm", "days": 2}'
FORMS = {
    "qwen": f'<tool_call>\n{{"name": "weather", "arguments": {ULM}}}\n</tool_call>',
    "in a sentence": f'Let me look. <tool_call>{{"name": "weather", "arguments": {ULM}}}</tool_call>',
    "cut off behind it": f'<tool_call>\n{{"name": "weather", "arguments": {ULM}}}',
    "own marker": f'<call>{{"name": "weather", "arguments": {ULM}}}</call>',
    "llama json": f'{{"name": "weather", "parameters": {ULM}}}',
    "llama tag": f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {ULM}}}',
    "llama function": f"<function=weather>{ULM}</function>",
    "llama python": '[weather(city="Ulm", days=2)]',
    "mistral list": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ULM}, "id": "a1b2c3d4e"}}]',
    "mistral name": f"[TOOL_CALLS]weather{ULM}",
    "mistral id": f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{ULM}",
    "openai": '{"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": "{\\"days\\": 2, \\"city\\": \\"Ulm\\"}"}}]}',
    "qwen coder": "<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
    "glm": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Ulm</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
    "deepseek": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{ULM}\n```<｜tool▁call▁end｜>",
    "kimi": f"<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{ULM}<|tool_call_end|>",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_read_in_the_form_of(form: str) -> None:
    assert (
        parse_calls(FORMS[form]) == parse_calls(FORMS["qwen"]) == [("weather", '{"city": "Ulm", "days": 2}')]
    )


def two(first: str, second: str) -> str:
    return f"<tool_call>\n{first}\n</tool_call>\n<tool_call>\n{second}\n</tool_call>"


def test_keys_and_calls_side_by_side_have_no_order() -> None:
    weather = '{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}'
    turned = '{"arguments": {"days": 2.0, "city": "Ulm"}, "name": "weather"}'
    add = '{"name": "add", "arguments": {"a": [1, {"x": null, "y": true}]}}'
    reference = two(weather, add)
    assert match_calls(two(add, turned), reference) == 1
    for wrong in (weather, add, two(weather, weather), f"{reference}\n{reference}", "", "weather in Ulm"):
        assert match_calls(wrong, reference) == 0, wrong
    for other in ('"days": 3', '"days": "2"', '"days": 2, "hours": 1', '"Days": 2'):
        assert match_calls(two(weather.replace('"days": 2', other), add), reference) == 0, other
    assert match_calls(two(weather, add.replace("true", "1")), reference) == 0, "true is no number"


@pytest.mark.parametrize(
    "text",
    [
        "plain prose",
        "print('x')",
        "dict(a=1)",
        "[1, 2]",
        '{"name": "Bob", "age": 3}',
        "f(x=1)",
        "<tool_call>{",
        "[" * 2000,
    ],
)
def test_what_calls_nothing_is_no_call(text: str) -> None:
    assert parse_calls(text) == []


def test_the_metric_is_chosen_where_references_call_and_applies_to_those() -> None:
    references = [FORMS["qwen"], "It is warm."]
    metrics, _ = choose_metrics(None, references, None, "cpu")
    (metric,) = [metric for metric in metrics if metric.name == "tool_calls"]
    assert metric.score([FORMS["llama json"], FORMS["qwen"]], references) == [1, None]
    metrics, _ = choose_metrics(None, ["It is warm."], None, "cpu")
    assert "tool_calls" not in [metric.name for metric in metrics]
