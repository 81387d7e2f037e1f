"""What vLLM's server is told: the command line that follows from the tuned models, and what is refused before it starts."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.exports import convert, load, load_adapted, logits_of, tuned_of, write_adapter
from support.own_templates import OWN_TEMPLATES
from support.serving import train_on_chats, train_on_rows, write_chats
from support.tokenizers import CHATML_TEMPLATE, TOKENIZER_KINDS, build_tokenizer
from tunesmith import cli
from tunesmith.config import HFDatasetConfig, ServeConfig
from tunesmith.data.asking import questions_for
from tunesmith.data.formats import choose_format
from tunesmith.errors import ConfigError
from tunesmith.options import split_passed_on
from tunesmith.runs.folder import RunDir
from tunesmith.serving.flags import Flags, make_flags
from tunesmith.serving.models import Served, find_served
from tunesmith.serving.server import example, write_flags
from tunesmith.serving.template import asks_as_trained, chat_template_of

ModelOf = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("alone")


def served_by(*models: Path | str, passed_on: tuple[str, ...] = (), **changes: Any) -> tuple[Served, Flags]:
    first, *more = map(str, models)
    config = ServeConfig(checkpoints_dir=first, more=more or None, **changes)
    served = find_served(config, passed_on)
    return served, make_flags(config, served)


def value_of(flags: Flags, name: str) -> str:
    """Return the words after a flag, up to the next."""
    rest = flags.words[flags.words.index(name) + 1 :]
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return " ".join(rest[:end])


def test_a_run_is_served_by_its_name_beside_its_base(of_chats: RunDir) -> None:
    served, flags = served_by(of_chats.path)
    best = of_chats.best_checkpoint()
    assert best is not None
    assert value_of(flags, "--model") == str(of_chats.home.parent / "base")
    assert value_of(flags, "--served-model-name") == "base"
    assert value_of(flags, "--lora-modules") == f"talk={best.path}"
    assert value_of(flags, "--max-lora-rank") == "8"
    assert value_of(flags, "--max-model-len") == "auto"
    assert value_of(flags, "--dtype") == "float32"
    assert value_of(flags, "--host") == "127.0.0.1" and value_of(flags, "--port") == "8000"
    assert "--enable-lora" in flags.words
    # The base's own is asked with: it is the run's.
    assert flags.chat_template is None and "--tokenizer" not in flags.words
    tokenizer = OWN_TEMPLATES["phi4"].build_tokenizer()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert flags.generation_config == {"eos_token_id": sorted(ends), "temperature": 0.6}
    asks = example(ServeConfig(host="0.0.0.0"), served)
    assert "http://127.0.0.1:8000/v1/chat/completions" in asks
    assert '"model": "talk"' in asks and '{"role": "system", "content": "Add."}' in asks


def test_files_of_the_flags_are_written(of_templates: RunDir, of_chats: RunDir) -> None:
    words = write_flags(served_by(of_chats.path)[1])
    folder = Path(words[words.index("--generation-config") + 1])
    assert 0 in json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    words = write_flags(served_by(of_templates.path)[1])
    assert "namespace" in Path(words[words.index("--chat-template") + 1]).read_text()


def test_two_adapters_of_one_base_are_served_together(
    of_templates: RunDir, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    other = train_on_rows(model_of("llama"), rows, tmp_path, run_name="other", lora_rank=24, seed=5)
    _, flags = served_by(of_templates.path, f"mine={other.path}")
    assert value_of(flags, "--lora-modules") == " ".join(
        [f"sums={of_templates.checkpoint_path(12)}", f"mine={other.checkpoint_path(12)}"]
    )
    assert value_of(flags, "--max-lora-rank") == "32"
    assert value_of(flags, "--max-loras") == "2"
    with pytest.raises(ConfigError, match="two models would be served as `sums`"):
        served_by(of_templates.path, f"sums={other.path}")


def test_rank_patterns_count(model_of: ModelOf, tmp_path: Path) -> None:
    write_adapter(
        model_of("llama"), tmp_path / "a", target_modules=["q_proj"], rank_pattern={"layers.1.*": 60}
    )
    _, flags = served_by(tmp_path / "a")
    assert value_of(flags, "--max-lora-rank") == "64"
    assert value_of(flags, "--lora-modules") == f"a={tmp_path / 'a'}"


def test_checkpoints_of_one_run_are_told_apart_by_their_steps(of_templates: RunDir, tmp_path: Path) -> None:
    shutil.copytree(of_templates.home, tmp_path / "home")
    run = RunDir(tmp_path / "home", of_templates.results_dir, of_templates.model_name, "sums")
    shutil.copytree(run.checkpoint_path(12), run.checkpoint_path(6))
    state = run.checkpoint_path(6) / "trainer_state.json"
    state.write_text(state.read_text().replace('"step": 12', '"step": 6'))
    served, _ = served_by(run.checkpoint_path(6), run.checkpoint_path(12))
    assert served.names == ("sums-6", "sums-12")


def test_adapters_of_different_bases_are_refused_by_name(of_templates: RunDir, of_chats: RunDir) -> None:
    with pytest.raises(ConfigError) as error:
        served_by(of_templates.path, of_chats.path)
    assert "`talk` was made from" in error.value.message and "`sums` from" in error.value.message


def test_adapters_with_chat_templates_that_differ_are_refused(
    of_chats: RunDir, rows: Path, tmp_path: Path
) -> None:
    model = of_chats.home.parent / "base"
    other = train_on_rows(model, rows, tmp_path, run_name="other")
    with pytest.raises(ConfigError, match="chat templates that differ"):
        served_by(of_chats.path, other.path)
    served, flags = served_by(of_chats.path, other.path, passed_on=("--chat-template", "x.jinja"))
    assert served.names == ("talk", "other") and flags.chat_template is None


def test_a_chat_template_of_the_runs_own_is_served(of_chats: RunDir, rows: Path, tmp_path: Path) -> None:
    model = of_chats.home.parent / "base"
    chats = write_chats(rows, tmp_path / "chats.jsonl")
    run = train_on_chats(model, chats, tmp_path / "home", chat_template=CHATML_TEMPLATE)
    assert served_by(run.path)[1].chat_template == CHATML_TEMPLATE


def test_whole_models_are_served_by_themselves(of_templates: RunDir, tmp_path: Path) -> None:
    export = convert(tuned_of(of_templates), tmp_path / "elsewhere")
    served, flags = served_by(export)
    assert value_of(flags, "--model") == str(export)
    assert value_of(flags, "--served-model-name") == "sums"
    assert "--lora-modules" not in flags.words
    assert served.chat_template is not None
    with pytest.raises(ConfigError, match="`sums` is a whole model"):
        served_by(export, of_templates.path)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_what_vllm_cannot_serve_as_an_adapter_is_merged_once(
    settings: dict[str, Any], model_of: ModelOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_adapter(model_of("qwen3"), tmp_path / "a", target_modules=["q_proj"], **settings)
    merged = [value_of(served_by(tmp_path / "a", home=tmp_path / "home")[1], "--model") for _ in range(2)]
    assert merged[0] == merged[1]
    assert Path(merged[0]).is_relative_to(tmp_path / "home" / "serving")
    assert (
        caplog.text.count(f"`{next(iter(settings))}`") == 1 and "an earlier call has exported" in caplog.text
    )
    expected = logits_of(load_adapted(model_of("qwen3"), tmp_path / "a"))
    torch.testing.assert_close(logits_of(load(Path(merged[0]))), expected, rtol=1e-4, atol=1e-4)
    write_adapter(model_of("qwen3"), tmp_path / "b", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="`a` can't be served beside others"):
        served_by(tmp_path / "b", tmp_path / "a", home=tmp_path / "home")


def test_a_whole_checkpoint_is_merged_into_its_run(of_whole: RunDir) -> None:
    _, flags = served_by(of_whole.path)
    folder = Path(value_of(flags, "--model"))
    assert folder.is_relative_to(of_whole.path / "serving")
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "llama"


@pytest.mark.parametrize(
    ("family", "alike"),
    [("phi4", True), ("gemma3", True), ("qwen3", True), ("llama3", True), ("deepseek_r1", False)],
)
def test_whether_a_server_asks_as_trained_is_told(family: str, alike: bool) -> None:
    """The last one's template opens a block of reasoning, which these rows don't have."""
    tokenizer = OWN_TEMPLATES[family].build_tokenizer()
    rows = [{"messages": OWN_TEMPLATES[family].talk(name)} for name in ("Ada", "Bo")]
    for row in rows:
        row["messages"][-1].pop("reasoning_content", None)
    row_format = choose_format(HFDatasetConfig(), rows[0], "rows").with_tokenizer(tokenizer, "2026-01-31")
    questions = questions_for(row_format, tokenizer, [row_format.render(row, "row") for row in rows], None)
    template = chat_template_of(questions, tokenizer)
    assert template is not None
    assert asks_as_trained(questions, tokenizer, template, "2026-01-31") == alike


SUMS = [{"question": "12 plus 30?", "answer": "42"}, {"question": "Why?", "answer": "Because it is."}]


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZER_KINDS if kind != "smollm2"])
@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("{instruction} ", "{output}"),
        ("### '{instruction}' {{x}}\n\\n ### é:\n", "### Response:\n{output}"),
        ("Q: {instruction}\n", "A: {output}"),
    ],
)
def test_the_servers_template_makes_the_prompts_that_were_trained(
    kind: str, asked: str, answered: str
) -> None:
    settings = HFDatasetConfig(
        input_template=asked,
        output_template=answered,
        field_mapping={"instruction": "question", "output": "answer"},
    )
    tokenizer = build_tokenizer(kind)
    row_format = choose_format(settings, SUMS[0], "rows").with_tokenizer(tokenizer, "2026-01-31")
    questions = questions_for(row_format, tokenizer, [row_format.render(row, "row") for row in SUMS], None)
    template = chat_template_of(questions, tokenizer)
    for text in ("Who's there?", "12 plus 30?", "{{ x }} {% y %}"):
        earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        messages = [*earlier, {"role": "user", "content": text}]
        shown = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        found = tokenizer(shown, add_special_tokens=False).input_ids
        found = found[:-1] if kind == "unigram" and found[-1] == tokenizer.eos_token_id else found
        assert tuple(found) == questions.prompt({"instruction": text}).input_ids


def test_without_vllm_there_is_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert cli.main(["serve", "nowhere"]) == 2
    assert "tunesmith[vllm]" in capsys.readouterr().err


def test_a_port_in_use_is_told_before_anything_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm = ModuleType("vllm")
    vllm.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", "nowhere", "--port", str(port)]) == 2
    assert f"can't listen on port {port}" in capsys.readouterr().err
    assert cli.main(["serve", "nowhere", "--host", "no.such.host.invalid"]) == 2
    assert "no.such.host.invalid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "own", "passed_on"),
    [
        (["a", "--port", "1"], ["a", "--port", "1"], []),
        (["a", "--", "--seed", "3", "--"], ["a"], ["--seed", "3", "--"]),
        (["a", "--"], ["a"], []),
    ],
)
def test_what_stands_behind_two_dashes_is_vllms(
    words: list[str], own: list[str], passed_on: list[str]
) -> None:
    assert split_passed_on(words) == (own, passed_on)
