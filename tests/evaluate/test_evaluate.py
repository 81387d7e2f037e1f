"""An evaluation from a run folder to its report: generated, kept, resumed, compared."""

from __future__ import annotations

import html
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.runs import copy_run, small_config, start, train_here, write_rows
from support.tiny_models import build_config, save_model
from support.tokenizers import build_tokenizer
from tunesmith import cli
from tunesmith.api import convert, evaluate
from tunesmith.cluster.pool import RayPool
from tunesmith.config import ConvertConfig, EvaluateConfig, ModelRef
from tunesmith.data.formats.template import parse_template
from tunesmith.errors import DataError, ModelError, RunError
from tunesmith.evaluate.engines.base import Request
from tunesmith.evaluate.engines.choose import make_engine
from tunesmith.evaluate.evaluation import run_evaluation
from tunesmith.evaluate.passes import Served, make_spec
from tunesmith.evaluate.plan import Plan, make_plan
from tunesmith.evaluate.store import GenerationStore, only_writer
from tunesmith.runs.folder import RunDir
from tunesmith.runs.tuned import find_tuned

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.slow]

ModelOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def run(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory, alone: None) -> RunDir:
    """A LoRA run with a test set of 12 rows."""
    folder = tmp_path_factory.mktemp("evaluated")
    rows = write_rows(folder / "rows.jsonl", num_rows=120)
    config = small_config(
        model_of("llama"),
        rows,
        folder / "home",
        max_steps=8,
        train_split_ratio=0.8,
        lora_rank=8,
        warmup_ratio=0.0,
    )
    return train_here(start(config))


@pytest.fixture
def fresh(run: RunDir, tmp_path: Path) -> RunDir:
    """A copy of the run that nothing has evaluated."""
    return copy_run(run, tmp_path / "home")


def settings(where: Path, **changes: Any) -> EvaluateConfig:
    fixed: dict[str, Any] = {"engine": "transformers", "max_tokens": 12, "metrics": ["chrf", "exact_match"]}
    return EvaluateConfig(**{**fixed, "checkpoints_dir": str(where), **changes})


def plan_of(config: EvaluateConfig) -> Plan:
    return make_plan(config, find_tuned(config), use_gpu=False)


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def greedy(model: Any, prompt_ids: tuple[int, ...], stop: tuple[int, ...], limit: int) -> list[int]:
    """Take the likeliest token again and again, each time from a forward over the whole text."""
    ids = list(prompt_ids)
    with torch.no_grad():
        while len(ids) < len(prompt_ids) + limit:
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in stop:
                break
            ids.append(token)
    return ids[len(prompt_ids) :]


@pytest.mark.parametrize("batch_size", [1, 5, 128])
def test_both_variants_are_what_their_models_say_one_prompt_at_a_time(
    run: RunDir, model_of: ModelOf, batch_size: int
) -> None:
    config = settings(run.path, batch_size=batch_size)
    plan = plan_of(config)
    served = Served(ModelRef(model_of("llama")), plan.tuned.folder)
    stop = plan.stop_token_ids
    spec = make_spec(config, served, "float32", plan.max_model_len, stop_token_ids=stop)
    requests = [
        Request(n, variant, prompt.input_ids)
        for n, prompt in plan.test_set.samples.items()
        for variant in plan.variants
    ]
    engine = make_engine("transformers", spec)
    found = {
        (g.sample, g.variant): list(g.token_ids) for together in engine.generate(requests) for g in together
    }
    engine.close()

    base = AutoModelForCausalLM.from_pretrained(model_of("llama"))
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_of("llama")), plan.tuned.folder
    )
    models = {"base": base.eval(), "tuned": tuned.eval()}
    expected = {(r.sample, r.variant): greedy(models[r.variant], r.prompt_ids, stop, 12) for r in requests}
    assert found == expected
    assert any(found[n, "base"] != found[n, "tuned"] for n, _ in found)


def test_an_evaluation_leaves_predictions_scores_and_a_report_outside_the_checkpoint(fresh: RunDir) -> None:
    before = sorted(fresh.checkpoint_path(8).rglob("*"))
    result = evaluate(settings(fresh.path))
    assert result.folder == fresh.evaluation_path("checkpoint_00000008")
    rows = predictions(result.folder)
    assert len(rows) == result.scores["num_samples"] == 12
    test_rows = [json.loads(line) for line in _test_file(fresh).read_text().splitlines()]
    # A blank before the answer is asked or answered, as the tokens have it.
    assert [(row["input"].rstrip(" "), row["reference"]) for row in rows] == [
        (r["input"].rstrip(" "), r["output"]) for r in test_rows
    ]
    tokenizer = AutoTokenizer.from_pretrained(fresh.checkpoint_path(8))
    for row in rows:
        assert row["num_prompt_tokens"] == len(tokenizer(row["input"]).input_ids)
        assert row["finish_reason"] in ("stop", "length")
        assert (row["num_tokens"] == 12) or row["finish_reason"] == "stop"
        assert set(row["scores"]) == set(row["base_scores"]) == {"chrf", "exact_match"}
    scores = json.loads((result.folder / "scores.json").read_text())
    assert scores == result.scores
    mean = sum(row["scores"]["chrf"] for row in rows) / len(rows)
    assert scores["metrics"]["chrf"]["tuned"]["mean"] == pytest.approx(mean)
    assert scores["loss"]["tuned"] < scores["loss"]["base"]
    assert scores["verdict"]["text"] in html.unescape((result.folder / "report.html").read_text())
    assert sorted(fresh.checkpoint_path(8).rglob("*")) == before
    assert "taking checkpoint_00000008" in (fresh.home / "logs/test_checkpoint.log").read_text()


def _test_file(run: RunDir) -> Path:
    return Path(run.read_params()["data"]["data_dir"]) / "test.jsonl"


def test_what_is_generated_is_not_generated_again(fresh: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    evaluate(settings(fresh.path, max_samples=5))
    first = predictions(fresh.evaluation_path("checkpoint_00000008"))
    caplog.clear()
    evaluate(settings(fresh.path, max_samples=5, metrics=["rougeL"]))
    assert "loading" not in caplog.text
    assert "10 of 10 answers are kept" in caplog.text
    evaluate(settings(fresh.path))
    assert "10 of 24 answers are kept" in caplog.text
    more = predictions(fresh.evaluation_path("checkpoint_00000008"))
    assert [row["prediction"] for row in more[:5]] == [row["prediction"] for row in first]
    caplog.clear()
    evaluate(settings(fresh.path, max_tokens=3))
    assert "generating anew: max_tokens differ" in caplog.text
    assert all(row["num_tokens"] <= 3 for row in predictions(fresh.evaluation_path("checkpoint_00000008")))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_evaluation_cut_short_goes_on(fresh: RunDir, run: RunDir, how: signal.Signals) -> None:
    flags = ["--engine=transformers", "--max_tokens=12", "--metrics=chrf,exact_match", "--batch_size=1"]
    command = [sys.executable, "-m", "tunesmith", "evaluate", str(fresh.path), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    kept = fresh.evaluation_path("checkpoint_00000008") / "generations.jsonl"
    wait_for(lambda: kept.exists() and len(kept.read_text().splitlines()) > 3, process)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how], output
    assert not (kept.parent / "predictions.jsonl").exists()
    before = [line for line in map(json.loads, _whole(kept)) if "sample" in line]
    assert 2 <= len(before) < 24

    evaluate(settings(fresh.path, batch_size=1))
    after = [line for line in map(json.loads, _whole(kept)) if "sample" in line]
    assert after[: len(before)] == before
    assert len(after) == len({(line["sample"], line["variant"]) for line in after}) == 24
    assert predictions(kept.parent) == predictions(evaluate(settings(run.path, batch_size=1)).folder)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)


def _whole(path: Path) -> Iterator[str]:
    return (line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))


@pytest.mark.ray
def test_a_replica_that_dies_is_replaced_and_its_samples_are_run_again(fresh: RunDir, run: RunDir) -> None:
    config = settings(fresh.path, batch_size=1, max_tokens=40)
    pool = _KillingPool(2, use_gpu=False, num_threads=1, gpus_each=0, cpus_each=1)
    result = run_evaluation(config, find_tuned(config), pool)
    assert pool.killed
    alone = evaluate(settings(run.path, batch_size=1, max_tokens=40))
    assert predictions(result.folder) == predictions(alone.folder)
    assert result.scores["engine"]["num_replicas"] == 2


class _KillingPool(RayPool):
    """Two real replicas, of which one is killed as soon as anything is generated."""

    killed: int | None = None

    def load(self, engine: str, spec: Any) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def loading() -> Iterator[Any]:
            with RayPool.load(self, engine, spec) as generate:

                def generate_and_kill(requests: Any) -> Iterator[Any]:
                    for generation in generate(requests):
                        if self.killed is None:
                            self.killed = _replicas()[0]
                            os.kill(self.killed, signal.SIGKILL)
                        yield generation

                yield generate_and_kill

        return loading()


def _replicas() -> list[int]:
    found = []
    for child in psutil.Process().children(recursive=True):
        # One may have ended since it was listed.
        with suppress(psutil.NoSuchProcess):
            if "Replica" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def test_rows_of_another_file_go_through_the_runs_templates(fresh: RunDir, tmp_path: Path) -> None:
    own = plan_of(settings(fresh.path)).test_set
    raw = tmp_path / "raw.jsonl"
    asked = [prompt.text.removesuffix(" ") for prompt in own.samples.values()]
    answers = [prompt.reference for prompt in own.samples.values()]
    raw.write_text(
        "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in zip(asked, answers, strict=True))
    )
    assert plan_of(settings(fresh.path, test_path=raw)).test_set.samples == own.samples
    rendered = tmp_path / "rendered.jsonl"
    rendered.write_text(_test_file(fresh).read_text())
    assert plan_of(settings(fresh.path, test_path=rendered)).test_set.samples == own.samples


def test_what_every_answer_begins_with_belongs_to_the_prompt(
    model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of("llama"), rows, tmp_path, max_steps=2, train_split_ratio=0.7)
    config = config.model_copy(update={"output_template": "### Response:\n{output}"})
    run = train_here(start(config))
    asked = plan_of(settings(run.path)).test_set.samples
    assert all(prompt.text.endswith(" ### Response:\n") for prompt in asked.values())
    assert all(prompt.reference.isdecimal() for prompt in asked.values())
    assert parse_template("Answer: {output}", "output_template").opening == "Answer: "
    assert parse_template("{{{output}}}", "output_template").opening == "{"


def test_an_answer_is_kept_for_its_own_prompt_and_weights_alone(
    model_of: ModelOf, run: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = tmp_path / "model"
    shutil.copytree(model_of("llama"), model)
    changed = tmp_path / "changed.jsonl"
    test = {"test_path": changed, "home": tmp_path}
    changed.write_text(_test_file(run).read_text())
    first = evaluate(settings(model, **test))
    weights = load_file(model / "model.safetensors")
    last = max(weights)
    weights[last] = weights[last] * 0.5
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    second = evaluate(settings(model, **test))
    assert "generating anew: tuned weights differ" in caplog.text
    assert second.folder == first.folder
    kept = (first.folder / "generations.jsonl").read_text()
    (first.folder / "generations.jsonl").write_text(kept.replace('"prompt": "', '"prompt": "another', 3))
    caplog.clear()
    evaluate(settings(model, **test))
    assert "9 of 12 answers are kept" in caplog.text


def test_a_base_model_that_cant_answer_is_refused_before_anything_is_generated(
    model_of: ModelOf, run: RunDir, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(build_config("llama", 50)).save_pretrained(tmp_path / "small")
    for base, message in ((tmp_path / "small", "knows 50 tokens"), (tmp_path / "absent", "not a folder")):
        config = settings(model_of("llama"), model_path=base, test_path=_test_file(run), home=tmp_path)
        with pytest.raises(ModelError, match=message):
            evaluate(config)
    assert not (tmp_path / "evaluation").exists()


def test_the_speed_is_that_of_what_was_generated_though_a_pass_was_killed(fresh: RunDir) -> None:
    result = evaluate(settings(fresh.path))
    generations = result.folder / "generations.jsonl"
    lines = generations.read_text().splitlines(keepends=True)
    generations.write_text("".join(lines[:13]))
    store = GenerationStore(result.folder, json.loads(lines[0])["identity"], {})
    assert store.seconds == pytest.approx(sum(json.loads(line)["seconds"] for line in lines[1:13]))
    assert len(store.finished) == 12


def test_half_a_surrogate_pair_is_refused_with_its_row(fresh: RunDir, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1?", "answer": "1"}\n{"question": "2?", "answer": "\\ud800"}\n')
    with pytest.raises(DataError, match="row 2 of"):
        evaluate(settings(fresh.path, test_path=path))


def test_an_export_elsewhere_keeps_the_templates_of_its_run(fresh: RunDir, tmp_path: Path) -> None:
    exported = convert(
        ConvertConfig(checkpoints_dir=str(fresh.path), output_dir=tmp_path / "out", verify=False)
    )
    own = plan_of(settings(fresh.path)).test_set
    raw = tmp_path / "raw.jsonl"
    asked = [(prompt.text.removesuffix(" "), prompt.reference) for prompt in own.samples.values()]
    raw.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in asked))
    assert plan_of(settings(exported.folder, test_path=raw)).test_set.samples == own.samples


def test_conversations_are_asked_up_to_the_last_answer_and_end_with_its_turn(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", build_tokenizer("chatml"))
    data = tmp_path / "chats.jsonl"
    with data.open("w") as file:
        for i in range(40):
            talk = [
                ("user", f"{i}?"),
                ("assistant", "yes"),
                ("user", f"and {i}?"),
                ("assistant", f"{i} indeed"),
            ]
            messages = [{"role": role, "content": content} for role, content in talk]
            file.write(json.dumps({"messages": messages}) + "\n")
    config = small_config(model, data, tmp_path / "home", max_steps=2, train_split_ratio=0.8)
    config = config.model_construct(
        _fields_set=config.model_fields_set - {"field_mapping", "input_template", "output_template"},
        **{**dict(config), "field_mapping": {}},
    )
    run = train_here(start(config))
    plan = plan_of(settings(run.path))
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = next(iter(plan.test_set.samples.values()))
    assert prompt.text.endswith("<|im_start|>assistant\n")
    assert prompt.reference.endswith(" indeed")
    assert "<|im_start|>assistant\nyes<|im_end|>" in prompt.text
    assert list(prompt.input_ids) == tokenizer(prompt.text, add_special_tokens=False).input_ids
    assert plan.test_set.end_tokens == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_whole_model_is_evaluated_beside_its_base_and_leaves_no_export_behind(
    model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    run = train_here(
        start(small_config(model_of("llama"), rows, tmp_path, full_ft=True, train_split_ratio=0.7))
    )
    result = evaluate(settings(run.path))
    assert result.scores["kind"] == "state"
    assert result.scores["metrics"]["chrf"]["difference"] is not None
    assert sorted(path.name for path in result.folder.iterdir() if path.name != ".lock") == [
        "generations.jsonl",
        "predictions.jsonl",
        "report.html",
        "scores.json",
    ]


def test_a_model_folder_is_evaluated_alone_or_beside_a_base_that_is_named(
    model_of: ModelOf, run: RunDir, tmp_path: Path
) -> None:
    test = {"test_path": _test_file(run), "home": tmp_path}
    alone = evaluate(settings(model_of("llama"), **test))
    assert alone.folder.parent == tmp_path / "evaluation"
    assert alone.folder.name.startswith("llama-")
    assert alone.scores["verdict"]["outcome"] == "alone"
    assert predictions(alone.folder)[0]["base_prediction"] is None
    both = evaluate(settings(model_of("llama"), model_path=model_of("llama"), **test))
    assert all(row["prediction"] == row["base_prediction"] for row in predictions(both.folder))
    assert both.scores["metrics"]["chrf"]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_sampling_follows_its_settings(fresh: RunDir) -> None:
    def answers(**sampling: Any) -> list[str]:
        return [row["prediction"] for row in predictions(evaluate(settings(fresh.path, **sampling)).folder)]

    greedy_answers = answers()
    assert answers(temperature=0.7, top_k=1) == greedy_answers
    assert answers(temperature=0.7, top_p=1e-6) == greedy_answers
    warm = answers(temperature=1.5)
    assert warm != greedy_answers
    assert answers(temperature=1.5, seed=7) != warm


@pytest.mark.parametrize(
    ("flags", "error", "hint"),
    [
        (["--max_samples", "0"], "`--max_samples` is `0`", "Test rows at most"),
        (["--metrics", "bleu"], "there is no metric `bleu`", "metrics"),
        (["--metrics", "tool_calls"], "no reference holds one", "`tool_calls`"),
        (["--test_path", "absent.jsonl"], "there is no test file `absent.jsonl`", "JSONL"),
        (["--test_path", "{empty}"], "is empty", "at least one row"),
        (["--checkpoint", "77"], "no checkpoint of step 77", "it has those of 6, 8"),
        (["--checkpoint", "newest"], "`--checkpoint` is `newest`", "best"),
        (
            ["--model_path", "{wider}"],
            "`model.layers.0.mlp.gate_proj` is 64×48, the adapter's 64×32",
            "--model_path",
        ),
        (["--model_path", "{phi3}"], "`model.layers.0.mlp.gate_proj` is absent", "--model_path"),
        (["--model_path", "absent"], "not a folder", "config.json"),
        (["--full_ft"], "holds a LoRA adapter", "leave `full_ft` out"),
        (["--max_model_len", "3"], "fill `max_model_len`", "raise --max_model_len"),
        (["--tensor_parallel_size", "2"], "has 2 GPUs", "at most the GPUs of one node"),
        (["--num_replicas", "99"], "this machine holds", "leave `num_replicas` out"),
    ],
)
def test_bad_input_is_named_and_hinted(
    fresh: RunDir,
    model_of: ModelOf,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    error: str,
    hint: str,
) -> None:
    places = {"{empty}": tmp_path / "empty.jsonl", "{wider}": tmp_path / "wider", "{phi3}": model_of("phi3")}
    (tmp_path / "empty.jsonl").touch()
    if "{wider}" in flags:
        save_model(tmp_path / "wider", build_tokenizer("byte_bpe"), hidden_size=48)
    words = [str(places.get(flag, flag)) for flag in flags]
    assert cli.main(["evaluate", str(fresh.path), "--engine=transformers", *words]) == 2
    message = capsys.readouterr().err
    problem, _, remedy = message.partition("hint: ")
    assert error in problem
    assert hint in remedy
    assert not (fresh.path / "evaluation").exists() or not any(fresh.path.glob("evaluation/*/*.json*"))


def test_vllm_where_it_is_not_installed_is_refused(
    fresh: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.evaluate.engines.choose.vllm_is_installed", lambda: False)
    assert cli.main(["evaluate", str(fresh.path), "--engine", "vllm"]) == 2
    assert "make vllm-cpu" in capsys.readouterr().err


def test_another_process_that_evaluates_is_waited_for(fresh: RunDir) -> None:
    folder = fresh.evaluation_path("checkpoint_00000008")
    with (
        only_writer(folder, lies_in_run=True),
        pytest.raises(RunError, match="another process is evaluating"),
    ):
        evaluate(settings(fresh.path))
