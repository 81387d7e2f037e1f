"""Generation with vLLM, which batches continuously and serves a LoRA adapter beside its base model. The only import of vllm."""

from __future__ import annotations

import gc
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pydantic

from tunesmith.errors import ModelError
from tunesmith.evaluate.engine import EngineSpec, Generation, Request
from tunesmith.model.lora import ADAPTER_CONFIG

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks
_ENVIRONMENT = {
    # In this process: whatever ends it, SIGKILL and `ray.kill` too, ends the engine. One of its own would live on.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
_CPU_BLOCK_TOKENS = 128
_CACHE_SHARE = 0.25


class VLLMEngine:
    """Hands vLLM every request at once; it runs `batch_size` of them and takes the next as one finishes."""

    name = "vllm"

    def __init__(self, spec: EngineSpec) -> None:
        """Load the model, and the adapter if there is one.

        Raises:
            ModelError: vLLM can't load or serve them on this machine.
        """
        import torch

        self._spec = spec
        self._num_threads = torch.get_num_threads()
        if spec.num_threads is not None:
            torch.set_num_threads(spec.num_threads)
        self._llm: LLM | None
        self._lora: LoRARequest | None
        self._llm, self._lora = _start(spec)

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        assert self._llm is not None, "the engine is closed"
        engine = self._llm.llm_engine
        pending: dict[str, Request] = {}
        try:
            for number, request in enumerate(requests):
                prompt = {"type": "token", "prompt_token_ids": list(request.prompt_ids)}
                lora = self._lora if request.variant == "tuned" else None
                engine.add_request(str(number), prompt, self._sampling(request), lora_request=lora)
                pending[str(number)] = request
            while pending:
                for output in engine.step():
                    if output.finished:
                        yield self._generation(pending.pop(output.request_id), output)
        finally:
            engine.abort_request(list(pending))

    def close(self) -> None:
        import torch

        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        torch.set_num_threads(self._num_threads)

    def _sampling(self, request: Request) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        spec = self._spec
        seed = np.random.SeedSequence((spec.seed, request.sample)).generate_state(1)[0]
        return SamplingParams(
            temperature=spec.temperature,
            top_k=spec.top_k,
            top_p=spec.top_p,
            max_tokens=spec.max_tokens,
            stop_token_ids=list(spec.stop_token_ids),
            ignore_eos=True,  # the end token is among the stop tokens; no other of the model's own ends an answer
            seed=None if spec.temperature == 0 else int(seed),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _generation(self, request: Request, output: RequestOutput) -> Generation:
        (completion,) = output.outputs
        ids = tuple(completion.token_ids)
        if completion.finish_reason == "stop":
            return Generation(request.sample, request.variant, ids[:-1], "stop")
        return Generation(request.sample, request.variant, ids, "length")


def unservable_reason(adapter: Path) -> str | None:
    return None


def _start(spec: EngineSpec) -> tuple[LLM, LoRARequest | None]:
    with _contained():
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.lora.request import LoRARequest

        try:
            llm = LLM(**_arguments(spec))
            if spec.adapter is None:
                return llm, None
            lora = LoRARequest("tuned", 1, str(spec.adapter))
            llm.llm_engine.add_lora(lora)  # here, so that an adapter it refuses shows before anything is generated
            return llm, lora
        except (ValueError, RuntimeError, OSError, ImportError, AssertionError) as error:
            cleanup_dist_env_and_memory()
            raise _not_started(spec, error) from None


def _arguments(spec: EngineSpec) -> dict[str, Any]:
    """Return the arguments of vllm.LLM."""
    arguments: dict[str, Any] = {
        "model": spec.model,
        "revision": spec.revision,
        "trust_remote_code": spec.trust_remote_code,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the model's own may hold penalties, with which greedy wouldn't be greedy
        "dtype": spec.dtype,
        "seed": spec.seed,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.batch_size,
        "tensor_parallel_size": spec.tensor_parallel_size,
        # Not Ray's, whose workers would want GPUs that the replica itself holds.
        "distributed_executor_backend": "mp" if spec.tensor_parallel_size > 1 else "uni",
        "gpu_memory_utilization": spec.gpu_memory_utilization,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if not spec.use_gpu:
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": _cache_bytes(spec)}
    if spec.adapter is not None:
        rank = _rank(json.loads((spec.adapter / ADAPTER_CONFIG).read_text()))
        limit = min(limit for limit in _LORA_RANKS if limit >= rank)
        # vLLM's CPU kernels (0.32) give requests without an adapter the last slot's: a second slot stays empty.
        arguments |= {"enable_lora": True, "max_lora_rank": limit, "max_loras": 1 if spec.use_gpu else 2}
    return arguments


def _cache_bytes(spec: EngineSpec) -> int:
    """Return the bytes of keys and values that `batch_size` full sequences need, within a share of the free memory.

    With less than that vLLM runs fewer sequences at once.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code
    ).get_text_config()
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item_bytes = getattr(torch, spec.dtype).itemsize
    block_bytes = 2 * config.num_hidden_layers * num_heads * head_size * item_bytes * _CPU_BLOCK_TOKENS
    blocks_each = -(-spec.max_model_len // _CPU_BLOCK_TOKENS)
    needed = (spec.batch_size * blocks_each + 1) * block_bytes
    return min(needed, max(int(psutil.virtual_memory().available * _CACHE_SHARE), blocks_each * block_bytes))


@contextmanager
def _contained() -> Iterator[None]:
    """Set vLLM's switches where the user hasn't, and undo what vLLM changes in this process while it starts."""
    import torch

    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    os.environ.update({**_ENVIRONMENT, **environment})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_num_threads = set_num_threads  # on the CPU vLLM puts one in its place that does nothing
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)


def _rank(adapter_config: dict[str, Any]) -> int:
    """Return the adapter's largest rank."""
    return max([adapter_config["r"], *(adapter_config.get("rank_pattern") or {}).values()])


def _not_started(spec: EngineSpec, error: Exception) -> ModelError:
    is_settings = isinstance(error, pydantic.ValidationError)
    reason = error.errors()[0]["msg"] if is_settings else str(error)
    return ModelError(f"{reason}")
