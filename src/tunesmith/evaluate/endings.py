"""How the answers ended: of themselves, cut off, still reasoning, or with nothing said; and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Literal

from tunesmith.evaluate.results import Endings, Prediction, Scores, format_score

Variant = Literal["tuned", "base"]


def count_endings(rows: Sequence[Prediction], variant: Variant, max_tokens: int) -> Endings:
    """Return how the answers of one of the models ended; the rows have their scores."""
    whole: list[dict[str, float | None]] = []
    cut = early = unended = empty = 0
    for row in rows:
        is_tuned = variant == "tuned"
        text = row["prediction"] if is_tuned else row["base_prediction"] or ""
        has_ended = row["reasoning_ended"] if is_tuned else bool(row["base_reasoning_ended"])
        is_cut = (row["finish_reason"] if is_tuned else row["base_finish_reason"]) == "length"
        cut += is_cut
        early += is_cut and ((row["num_tokens"] if is_tuned else row["base_num_tokens"]) or 0) < max_tokens
        unended += not has_ended
        empty += has_ended and not text.strip()
        if has_ended and not is_cut and text.strip():
            whole.append(row["scores"] if is_tuned else row["base_scores"] or {})
    return Endings(
        answers=len(rows),
        cut=cut,
        cut_early=early,
        unended=unended,
        empty=empty,
        num_whole=len(whole),
        whole=_means(whole),
    )


def _means(scored: Sequence[dict[str, float | None]]) -> dict[str, float]:
    columns: dict[str, list[float]] = {}
    for scores in scored:
        for name, value in scores.items():
            if value is not None:
                columns.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in columns.items()}


def describe_endings(scores: Scores) -> Iterator[tuple[str, str]]:
    """Yield each model with answers that ended badly, how many did, and the mean without them beside the mean."""
    primary = scores["verdict"]["metric"]
    metric = scores["metrics"][primary]
    for variant in ("base", "tuned"):
        endings = scores["endings"].get(variant)
        mean = metric["tuned"] if variant == "tuned" else metric["base"]
        if endings is None or mean is None or not (endings["cut"] or endings["unended"] or endings["empty"]):
            continue
        text = "; ".join(_name_bad(endings, scores["generation"]["max_tokens"]))
        if primary in endings["whole"]:
            others = f"{endings['num_whole']:,} other" + ("s" if endings["num_whole"] > 1 else "")
            text += (
                f"; {metric['label']} {format_score(endings['whole'][primary], metric['scale'])} over the "
                f"{others}, {format_score(mean['mean'], metric['scale'])} over all"
            )
        yield variant, text


def _name_bad(endings: Endings, max_tokens: int) -> Iterator[str]:
    of_all = f"of {endings['answers']:,} answers"
    if endings["cut"]:
        text = f"{endings['cut']:,} {of_all} never ended: cut off at {max_tokens:,} tokens (--max_tokens)"
        if early := endings["cut_early"]:
            text += f", {early:,} of them before, where max_model_len ends"
        yield text
    if endings["unended"]:
        yield f"{endings['unended']:,} {of_all} never left their reasoning, and count as empty"
    if endings["empty"]:
        yield f"{endings['empty']:,} {of_all} are empty, and score 0"
