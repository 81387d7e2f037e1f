"""The answers of the tuned and the base model, as far as they aren't kept from an earlier evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tunesmith.config import EvaluateConfig
from tunesmith.evaluate.engines.base import AdapterRefusedError, Request
from tunesmith.evaluate.engines.pool import Pool
from tunesmith.evaluate.passes import Served, make_spec, served_as_adapter, served_whole
from tunesmith.evaluate.plan import Plan
from tunesmith.evaluate.store import GenerationStore
from tunesmith.view.bar import track_progress

logger = logging.getLogger(__name__)


def generate_missing(
    config: EvaluateConfig,
    plan: Plan,
    pool: Pool,
    store: GenerationStore,
    requests: Sequence[Request],
    folder: Path,
) -> None:
    """Generate the answers that `store` doesn't hold yet, and keep them in it.

    The base model serves the adapter too where the engine can and the adapter leaves it as it is; else each model is
    loaded in its turn. `folder` takes an export of the tuned one for that while, where the engine needs one.

    Raises:
        ModelError: the engine can't load or serve a model.
        EvaluationError: the replicas keep failing.
    """
    missing = store.missing(requests)
    kept = len(requests) - len(missing)
    if kept:
        logger.info("%d of %d answers are kept from an earlier evaluation", kept, len(requests))
    if not missing:
        return
    of_tuned = [request for request in missing if request.variant == "tuned"]
    of_base = [request for request in missing if request.variant == "base"]
    adapter, refusal = served_as_adapter(plan.tuned, plan.engine, pool.use_gpu)
    if adapter is not None:
        try:
            if plan.leaves_base:
                _serve(config, plan, pool, store, adapter, missing)
                return
            if of_tuned:
                _serve(config, plan, pool, store, adapter, of_tuned)
                of_tuned = []
        except AdapterRefusedError as error:
            refusal = error.message
    if of_tuned:
        with served_whole(plan.tuned, refusal, folder, plan.trust_remote_code) as served:
            _serve(config, plan, pool, store, served, of_tuned)
    if of_base:
        assert plan.tuned.base is not None
        _serve(config, plan, pool, store, Served(plan.tuned.base), of_base)


def _serve(
    config: EvaluateConfig,
    plan: Plan,
    pool: Pool,
    store: GenerationStore,
    served: Served,
    requests: Sequence[Request],
) -> None:
    spec = make_spec(
        config,
        served,
        plan.dtype,
        plan.max_model_len,
        stop_token_ids=plan.stops_of("tuned" if any(it.variant == "tuned" for it in requests) else "base"),
        use_gpu=pool.use_gpu,
        num_threads=pool.num_threads,
    )
    logger.info("loading `%s` in %s, %s", served.model.source, plan.engine, plan.dtype)
    with (
        pool.load(plan.engine, spec) as generate,
        track_progress("generating", len(requests), "answers", "tokens") as tracker,
    ):
        for together in store.record(generate(requests)):
            tracker.advance(len(together), second=sum(len(each.token_ids) for each in together))
