"""The chat template that is given in place of a tokenizer's own."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from support.tokenizers import CHATML_TEMPLATE, build_tokenizer
from tunesmith.config import ModelRef
from tunesmith.errors import ConfigError
from tunesmith.model.load import load_tokenizer

SHORT = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> ModelRef:
    tokenizer = pickle.loads(pickle.dumps(build_tokenizer("chatml")))
    tokenizer.chat_template = {"default": CHATML_TEMPLATE, "short": SHORT}
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return ModelRef(tmp_path / "model", None, False)


def test_a_file_a_name_or_a_text_takes_the_place_of_the_tokenizers(model: ModelRef, tmp_path: Path) -> None:
    (tmp_path / "short.jinja").write_text(SHORT)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": SHORT}))
    for given in (str(tmp_path / "short.jinja"), str(tmp_path / "chat_template.json"), "short", SHORT):
        tokenizer = load_tokenizer(model, chat_template=given)
        assert tokenizer.chat_template == SHORT, given
        # What is saved with the tuned model is what it was trained with.
        tokenizer.save_pretrained(tmp_path / "final")
        assert load_tokenizer(model, tmp_path / "final").chat_template == SHORT


@pytest.mark.parametrize(
    ("given", "said", "hint"),
    [
        ("absent.jinja", "there is no chat template `absent.jinja`", "`default`, `short`"),
        ("{% for m in messages %}{{ m.content }}", "no Jinja template: line 1", "mend"),
        ("broken.json", "can't read a chat template from `broken.json`", "Jinja"),
    ],
)
def test_what_is_no_template_is_refused(
    model: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match=said) as error:
        load_tokenizer(model, chat_template=given)
    assert hint in str(error.value.hint)
