"""One evaluation, top to bottom: samples, generations of tuned and base, scores, report."""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tunesmith.atomic_files import write_json, write_json_lines
from tunesmith.config import EvaluateConfig
from tunesmith.evaluate.endings import count_endings
from tunesmith.evaluate.engines.pool import Pool
from tunesmith.evaluate.generate import generate_missing
from tunesmith.evaluate.metrics.score import (
    Metric,
    choose_metrics,
    score_anew,
    score_predictions,
    summarise,
)
from tunesmith.evaluate.passes import plan_requests
from tunesmith.evaluate.plan import Plan, evaluation_folder, make_plan
from tunesmith.evaluate.report import write_report
from tunesmith.evaluate.results import (
    RULES,
    Endings,
    EngineRecord,
    GenerationRecord,
    LossRecord,
    MetricScores,
    Prediction,
    Scores,
    ThroughputRecord,
    TrainedOn,
)
from tunesmith.evaluate.store import GenerationStore, only_writer
from tunesmith.evaluate.verdict import judge
from tunesmith.runs.folder import FORMAT_VERSION
from tunesmith.runs.metrics_log import untrained_loss
from tunesmith.runs.tuned import TunedModel
from tunesmith.view.figures import render_loss_curve

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found: the content of its `scores.json`, and the folder of that and the report."""

    folder: Path
    scores: Scores


def run_evaluation(config: EvaluateConfig, tuned: TunedModel, pool: Pool) -> EvaluationResult:
    """Generate, score and report; goes on from what an earlier, unfinished evaluation has kept.

    Raises:
        ConfigError, DataError, ModelError, RunError: bad input, before anything is generated.
    """
    plan = make_plan(config, tuned, pool.use_gpu)
    references = [reference.text for reference in plan.asked_references()]
    device = "cuda" if pool.use_gpu and not pool.is_elsewhere else "cpu"
    metrics, left_out = choose_metrics(config.metrics, references, config.bertscore_model, device)
    if plan.test_set.calling and config.metrics is None and "tool_calls" not in {it.name for it in metrics}:
        left_out["tool_calls"] = (
            "the chat template writes calls in a form that isn't known here: they are text"
        )
    folder = evaluation_folder(config, tuned)
    with only_writer(folder, lies_in_run=tuned.run is not None):
        requests = plan_requests(plan.test_set, plan.variants, plan.base_prompts)
        prompts = {number: prompt.input_ids for number, prompt in plan.test_set.samples.items()}
        store = GenerationStore(folder, plan.identity(config), prompts)
        generate_missing(config, plan, pool, store, requests, folder)
        rows = _score(_make_rows(plan, store), metrics, pool, config.bertscore_model)
        results = summarise(rows, metrics, config.seed)
        scores = _describe(config, plan, pool, store, rows, results, left_out)
        _note_older_scores(folder)
        write_json_lines(folder / "predictions.jsonl", rows)
        write_json(folder / "scores.json", scores)
        curve = render_loss_curve(tuned.run) if tuned.run else None
        write_report(scores, rows, curve, folder / "report.html")
    return EvaluationResult(folder, scores)


def _make_rows(plan: Plan, store: GenerationStore) -> list[Prediction]:
    """Return the lines of `predictions.jsonl`, still without scores."""
    rows, test_set = [], plan.test_set
    for number, prompt in test_set.samples.items():
        tuned, reference = store.finished["tuned", number], test_set.references[number]
        base = store.finished["base", number] if plan.base is not None else None
        answer, base_answer = plan.read(tuned), plan.read(base) if base else None
        rows.append(
            Prediction(
                id=number,
                group=test_set.groups[number],
                trained=(test_set.trained or {}).get(number),
                input=prompt.text,
                reference=reference.text,
                reference_reasoning=reference.reasoning,
                prediction=answer.text,
                reasoning=answer.reasoning,
                reasoning_ended=answer.ended,
                base_prediction=base_answer.text if base_answer else None,
                base_reasoning=base_answer.reasoning if base_answer else None,
                base_reasoning_ended=base_answer.ended if base_answer else None,
                scores={},
                base_scores=None,
                finish_reason=tuned.finish_reason,
                base_finish_reason=base.finish_reason if base else None,
                num_prompt_tokens=len(prompt.input_ids),
                num_tokens=len(tuned.token_ids),
                base_num_tokens=len(base.token_ids) if base else None,
            )
        )
    return rows


def _note_older_scores(folder: Path) -> None:
    """Tell where the scores that are replaced were counted by other rules."""
    try:
        rules = json.loads((folder / "scores.json").read_text(encoding="utf-8")).get("rules", 1)
    except (OSError, ValueError, AttributeError):
        return
    if rules != RULES:
        logger.warning(
            "the last evaluation in `%s` compared answers by other rules (%s, now %d): its scores are counted anew, "
            "and the old ones don't compare with these",
            folder,
            rules,
            RULES,
        )


def _score(
    rows: Sequence[Prediction], metrics: Sequence[Metric], pool: Pool, bertscore_model: str | None
) -> list[Prediction]:
    """Return the rows with their scores, computed on a GPU where there is one."""
    if not (pool.use_gpu and pool.is_elsewhere):
        return score_predictions(rows, metrics)
    logger.info("scoring on a GPU of the cluster, as soon as one is free")
    return pool.call_on_gpu(score_anew, rows, [metric.name for metric in metrics], bertscore_model, "cuda")


def _describe(
    config: EvaluateConfig,
    plan: Plan,
    pool: Pool,
    store: GenerationStore,
    rows: Sequence[Prediction],
    results: dict[str, MetricScores],
    left_out: dict[str, str],
) -> Scores:
    tuned, test_set = plan.tuned, plan.test_set
    finish = {"tuned": dict(Counter(row["finish_reason"] for row in rows))}
    if plan.base is not None:
        finish["base"] = dict(Counter(row["base_finish_reason"] or "" for row in rows))
    counts = Counter(test_set.trained.values()) if test_set.trained is not None else None
    trained_on = None if counts is None else TrainedOn(rows=counts["row"], prompts=counts["prompt"])
    endings: dict[str, Endings] = {
        variant: count_endings(rows, variant, config.max_tokens) for variant in plan.variants
    }
    return Scores(
        format_version=FORMAT_VERSION,
        rules=RULES,
        run=tuned.run.run_name if tuned.run else None,
        checkpoint=tuned.folder.name,
        step=tuned.step,
        why=tuned.why,
        kind=tuned.kind,
        base=plan.base.name if plan.base else None,
        tuned=tuned.label,
        test_set=str(test_set.path),
        num_samples=len(rows),
        num_different=len(set(test_set.groups.values())),
        num_skipped=sum(test_set.left_out.values()),
        first_rows=config.max_samples if test_set.has_more else None,
        rows_left_out=test_set.left_out,
        trained_on=trained_on,
        engine=EngineRecord(
            name=plan.engine,
            version=_engine_version(plan.engine),
            dtype=plan.dtype,
            num_replicas=pool.num_replicas,
        ),
        generation=GenerationRecord(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            max_tokens=config.max_tokens,
            seed=config.seed,
        ),
        loss=_losses(plan),
        metrics=results,
        left_out=left_out,
        throughput=ThroughputRecord(
            samples=len(store.finished),
            tokens=sum(len(generation.token_ids) for generation in store.finished.values()),
            seconds=store.seconds,
        ),
        finish=finish,
        endings=endings,
        verdict=judge(results, trained_on, len(rows)),
    )


def _engine_version(engine: str) -> str:
    for package in (engine, f"{engine}-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
    return "unknown"


def _losses(plan: Plan) -> LossRecord | None:
    """Return the validation losses that the training measured; the base model's is that of step 0."""
    tuned = plan.tuned
    if tuned.run is None or tuned.eval_loss is None:
        return None
    before = untrained_loss(tuned.run) if plan.base_is_recorded else None
    return LossRecord(base=before, tuned=tuned.eval_loss)
