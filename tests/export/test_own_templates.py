"""Each family's own chat template, from a run's rows to what its export answers."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from support.exports import convert, load, tuned_of
from support.long import long_but
from support.own_templates import ANSWER, FIRST, LAST, NAME, OWN_TEMPLATES, SECOND, THOUGHT, OwnTemplate
from support.runs import small_config, start, train_here
from support.tiny_models import save_model
from tunesmith.config import ChatConfig, EvaluateConfig, ModelRef, TrainConfig
from tunesmith.data.prepare import open_prepared
from tunesmith.evaluate.answers import Answer as ReadAnswer
from tunesmith.evaluate.engines.base import Request
from tunesmith.evaluate.engines.choose import make_engine
from tunesmith.evaluate.passes import Served, make_spec
from tunesmith.evaluate.plan import Plan, make_plan
from tunesmith.runs.folder import RunDir
from tunesmith.runs.tuned import find_tuned
from tunesmith.serving.chat import Answer, open_chat
from tunesmith.train.worker import TrainJob

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.slow]

KEPT = ("qwen3", "llama3", "gemma2", "deepseek_r1")
NAMES = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo", "Kim", "Lu"]
# Enough to learn one answer by heart.
STEPS = 40
ENOUGH = {
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    "lora_rank": 8,
    "learning_rate": 2e-2,
}


@dataclass(frozen=True)
class Tuned:
    """A run on talks through a template, and of each trained row, by its number, the ids before and of its last answer."""

    own: OwnTemplate
    base: Path
    rows: Path
    run: RunDir
    trained: dict[int, tuple[list[int], list[int]]]

    @cached_property
    def date(self) -> datetime.date:
        """The day of the run's talks."""
        recorded = self.run.read_params()["data"].get("date")
        return datetime.date.fromisoformat(recorded) if recorded else datetime.date.today()

    @cached_property
    def end(self) -> int:
        return int(AutoTokenizer.from_pretrained(self.base).convert_tokens_to_ids(self.own.end))

    @property
    def said(self) -> str:
        """What the model has learned to say, as whoever asks sees it."""
        return self.own.answer.removesuffix(self.own.end)


@pytest.fixture(scope="module", params=long_but(KEPT, OWN_TEMPLATES))
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, alone: None) -> Tuned:
    own = OWN_TEMPLATES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    rows = write_talks(own, folder / "rows.jsonl")
    base = save_model(folder / "base", own.build_tokenizer(), own.family)
    job = start(settings(base, rows, folder / "home"))
    return Tuned(own, base, rows, train_here(job), trained_ids(job, rows))


def test_an_answer_is_trained_from_its_prompt_s_end_to_its_end_token(tuned: Tuned) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tuned.run.checkpoint_path(STEPS))
    for row, (prompt_ids, answer_ids) in tuned.trained.items():
        assert tokenizer.decode(prompt_ids) == tuned.own.prompt_of(NAMES[row], tuned.date)
        assert tokenizer.decode(answer_ids) == tuned.own.answer
        assert answer_ids[-1] == tuned.end


def test_an_evaluation_asks_as_was_trained_and_is_answered_so(tuned: Tuned) -> None:
    plan = plan_evaluation(tuned.run, tuned.rows)
    assert tuned.end in plan.stop_token_ids
    for row, (prompt_ids, _) in tuned.trained.items():
        assert list(plan.test_set.samples[row].input_ids) == prompt_ids
    # A think block is taken off what is compared, on both sides.
    assert {reference.text for reference in plan.test_set.references.values()} == {LAST}
    for answer in answers(plan, tuned.base):
        assert (answer.text.strip(), answer.ended) == (LAST, True)
        assert answer.reasoning == (THOUGHT if tuned.own.reasons else "")


def test_an_export_has_the_run_s_template_and_stops(tuned: Tuned, tmp_path: Path) -> None:
    exported = convert(tuned_of(tuned.run), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template == tuned.own.template
    ends = GenerationConfig.from_pretrained(exported).eos_token_id
    assert tuned.end in (ends if isinstance(ends, list) else [ends])
    model = load(exported)
    for row, (prompt_ids, answer_ids) in tuned.trained.items():
        asked = tokenizer.apply_chat_template(
            tuned.own.talk(NAMES[row])[:-1],
            add_generation_prompt=True,
            return_dict=False,
            strftime_now=tuned.date.strftime,
        )
        assert asked == prompt_ids
        said = model.generate(torch.tensor([asked]), max_new_tokens=len(answer_ids) + 8, do_sample=False)
        assert said[0, len(asked) :].tolist() == answer_ids


def test_a_chat_asks_as_was_trained_and_is_answered_so(tuned: Tuned) -> None:
    with open_chat(ChatConfig(checkpoints_dir=str(tuned.run.path), max_tokens=32)) as chat:
        for row, (prompt_ids, _) in tuned.trained.items():
            chat.reset()
            first, second = ({"user": text.replace(NAME, NAMES[row])} for text in (FIRST, SECOND))
            chat.remember(first, Answer(ANSWER, "stop"))
            assert list(chat.prompt_ids(second)) == prompt_ids
            pieces: list[str] = []
            answer = chat.ask(chat.prompt_ids(second), chat.speakers[0], pieces.append)
            assert (answer.text, answer.ending) == (tuned.said, "stop")
            assert "".join(pieces) == tuned.said


def write_talks(own: OwnTemplate, path: Path) -> Path:
    path.write_text("".join(json.dumps({"messages": own.talk(name)}) + "\n" for name in NAMES))
    return path


def settings(base: Path, rows: Path, home: Path) -> TrainConfig:
    chosen = small_config(
        base, rows, home, **ENOUGH, max_steps=STEPS, save_steps=STEPS, eval_steps=0, max_seq_length=160
    )
    of_templates = {"field_mapping", "input_template", "output_template"}
    return TrainConfig(**chosen.model_dump(exclude_unset=True, exclude=of_templates))


def trained_ids(job: TrainJob, rows: Path) -> dict[int, tuple[list[int], list[int]]]:
    """Return the ids before the last answer, and its own, of the trained rows by their numbers in the file."""
    prepared = open_prepared(job.prepared_path)
    lines = (prepared.data_dir / "training.jsonl").read_text().splitlines()
    talks = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    found = {}
    for index in range(prepared.train.num_examples):
        messages = json.loads(lines[int(prepared.train.rows[index])])["messages"]
        ids, is_trained = prepared.train.example(index)
        (begins,) = np.nonzero(is_trained & ~np.roll(is_trained, 1))
        stop = int(np.flatnonzero(is_trained)[-1]) + 1
        number = next(i for i, talk in enumerate(talks) if says_the_same(talk, messages))
        begin = int(begins[-1])
        # Where answers are rendered differently once they are past, each is an example of its own.
        if number not in found or begin > len(found[number][0]):
            found[number] = ids[:begin].tolist(), ids[begin:stop].tolist()
    assert len(found) > len(NAMES) // 2
    return found


def says_the_same(talk: list[dict[str, Any]], messages: list[dict[str, Any]]) -> bool:
    return [message["content"] for message in talk] == [message["content"] for message in messages]


def plan_evaluation(run: RunDir, rows: Path) -> Plan:
    config = EvaluateConfig(
        checkpoints_dir=str(run.path), test_dataset=str(rows), engine="transformers", max_tokens=32
    )
    return make_plan(config, find_tuned(config), use_gpu=False)


def answers(plan: Plan, base: Path) -> list[ReadAnswer]:
    """Return what the tuned model answers, each ended by itself."""
    config = EvaluateConfig(max_tokens=32)
    spec = make_spec(
        config,
        Served(ModelRef(base), plan.tuned.folder),
        "float32",
        plan.max_model_len,
        stop_token_ids=plan.stop_token_ids,
    )
    engine = make_engine("transformers", spec)
    requests = [Request(row, "tuned", prompt.input_ids) for row, prompt in plan.test_set.samples.items()]
    made = [generation for together in engine.generate(requests) for generation in together]
    engine.close()
    assert {generation.finish_reason for generation in made} == {"stop"}
    assert {generation.sample for generation in made} == set(range(len(NAMES)))
    return [plan.read(generation) for generation in made]
