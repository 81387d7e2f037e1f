"""Generation with vLLM, which batches continuously and serves a LoRA adapter beside its base model. The only import of vllm."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pydantic

from tunesmith.errors import ModelError
from tunesmith.evaluate.engines.base import AdapterRefusedError, EngineSpec, Generation, Request
from tunesmith.evaluate.engines.sampling import sample_seed
from tunesmith.machine import available_memory, socket_folder
from tunesmith.model.adapters.vllm import lora_arguments, vllm_refuses

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

_ENVIRONMENT = {
    # Compiled at the start, by an nvcc that few images have.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # In this process: what ends it, SIGKILL and `ray.kill` too, ends the engine. One of its own would live on.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
_START_ERRORS = (
    ValueError,
    RuntimeError,
    OSError,
    ImportError,
    AssertionError,
    AttributeError,
    KeyError,
)
_BLOCK_TOKENS = 128  # of the cache on CPUs
_CACHE_SHARE = 0.25  # of the free memory, at most
# vLLM's CPU kernels copy the adapter's weights for every token of a step: large steps are slow and take gigabytes.
_PROMPT_TOKENS_A_STEP = 128


class VLLMEngine:
    """Hands vLLM all requests at once; it runs `batch_size` of them and takes the next as one finishes."""

    name = "vllm"

    def __init__(self, spec: EngineSpec) -> None:
        """Load the model, and the adapter if there is one. Takes the process's torch.distributed group for itself.

        Raises:
            ModelError: vLLM can't load or serve them on this machine.
        """
        import torch

        self._spec = spec
        self._num_threads = torch.get_num_threads()
        if spec.num_threads is not None:
            torch.set_num_threads(spec.num_threads)
        self._llm: LLM | None
        self._llm, self._lora = _start(spec)

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Generation]]:
        if self._spec.use_gpu or self._lora is None:
            yield from self._generate_together(requests)
            return
        # vLLM's CPU kernels (0.32) put the adapter on base requests that share a step with tuned ones.
        for variant in ("tuned", "base"):
            yield from self._generate_together([r for r in requests if r.variant == variant])

    @property
    def llm(self) -> LLM:
        """The loaded model, until the engine is closed."""
        assert self._llm is not None, "the engine is closed"
        return self._llm

    def close(self) -> None:
        import torch

        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        if self._spec.use_gpu:
            torch.cuda.empty_cache()  # else the next engine finds its share of the GPU taken
        torch.set_num_threads(self._num_threads)

    def _generate_together(self, requests: Sequence[Request]) -> Iterator[list[Generation]]:
        engine = self.llm.llm_engine
        pending: dict[str, Request] = {}
        try:
            for number, request in enumerate(requests):
                prompt = {"type": "token", "prompt_token_ids": list(request.prompt_ids)}
                lora = self._lora if request.variant == "tuned" else None
                engine.add_request(str(number), prompt, self._sampling(request), lora_request=lora)
                pending[str(number)] = request
            while pending:
                finished = engine.step()
                if finished:
                    yield [_generation(pending.pop(output.request_id), output) for output in finished]
        finally:
            engine.abort_request(list(pending))

    def _sampling(self, request: Request) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        spec = self._spec
        return SamplingParams(
            temperature=spec.temperature,
            top_k=spec.top_k,
            top_p=spec.top_p,
            max_tokens=spec.max_tokens,
            stop_token_ids=list(spec.stop_token_ids),
            ignore_eos=True,  # the stop tokens alone end an answer
            seed=sample_seed(spec.seed, request.sample) if spec.temperature > 0 else None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def _start(spec: EngineSpec) -> tuple[LLM, LoRARequest | None]:
    """Return the loaded model and the handle of its adapter, if there is one."""
    from transformers import AutoConfig

    with _contained():
        from vllm import LLM, SamplingParams
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.lora.request import LoRARequest

        llm = lora = None
        try:
            model_config = AutoConfig.from_pretrained(
                spec.model.source,
                revision=spec.model.revision,
                trust_remote_code=spec.model.trust_remote_code,
            )
            arguments = _arguments(spec, model_config)
            if spec.adapter is not None:
                if reason := vllm_refuses(spec.adapter, model_config, spec.use_gpu):
                    raise _not_served(spec, reason)
                arguments |= lora_arguments(spec.adapter)
                lora = LoRARequest("tuned", 1, str(spec.adapter))
            llm = LLM(**arguments)
            # One token: an adapter that it refuses, or kernels that it lacks, show only now.
            trial = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
            llm.generate({"prompt_token_ids": [0]}, trial, lora_request=lora, use_tqdm=False)
        except ModelError:
            raise
        except _START_ERRORS as error:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            cleanup_dist_env_and_memory()
            raise _not_started(spec, error) from None  # its frames hold the model
        return llm, lora


def _arguments(spec: EngineSpec, model_config: PretrainedConfig) -> dict[str, Any]:
    """Return the arguments of vllm.LLM, adapters aside."""
    arguments: dict[str, Any] = {
        "model": str(spec.model.source),
        "revision": spec.model.revision,
        "trust_remote_code": spec.model.trust_remote_code,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # a model's own may hold penalties, with which greedy wouldn't be greedy
        "dtype": spec.dtype,
        "seed": spec.seed,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.batch_size,
        "tensor_parallel_size": spec.tensor_parallel_size,
        # Not Ray's workers: they would want GPUs of their own, and the replica holds them already.
        "distributed_executor_backend": "mp" if spec.tensor_parallel_size > 1 else "uni",
        "gpu_memory_utilization": spec.gpu_memory_utilization,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if not spec.use_gpu:
        arguments |= {
            "enforce_eager": True,
            "max_num_batched_tokens": spec.batch_size + _PROMPT_TOKENS_A_STEP,
            "kv_cache_memory_bytes": cache_bytes(
                model_config.get_text_config(), spec.dtype, spec.max_model_len, spec.batch_size
            ),
        }
    return arguments


def cache_bytes(text_config: Any, dtype: str, max_model_len: int, num_sequences: int) -> int:
    """Return the bytes of keys and values that full sequences need on a CPU, within a share of the free memory.

    With less than they need vLLM runs fewer sequences at once.
    """
    import torch

    num_heads = text_config.num_attention_heads
    num_key_heads = getattr(text_config, "num_key_value_heads", None) or num_heads
    head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads
    item_bytes = getattr(torch, dtype).itemsize
    block_bytes: int = (
        2 * text_config.num_hidden_layers * num_key_heads * head_size * item_bytes * _BLOCK_TOKENS
    )
    sequence_bytes = -(-max_model_len // _BLOCK_TOKENS) * block_bytes
    share_bytes = int(available_memory() * _CACHE_SHARE)
    # vLLM keeps one block empty.
    return min(num_sequences * sequence_bytes, max(share_bytes, sequence_bytes)) + block_bytes


@contextmanager
def _contained() -> Iterator[None]:
    """Set vLLM's switches where the user hasn't, and undo what vLLM changes in this process while it starts."""
    import torch

    environment = dict(os.environ)
    set_num_threads, excepthook = torch.set_num_threads, sys.excepthook
    os.environ.update({**_ENVIRONMENT, "VLLM_RPC_BASE_PATH": socket_folder(), **environment})
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # CPUs have none
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_num_threads, sys.excepthook = set_num_threads, excepthook
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)


def _generation(request: Request, output: RequestOutput) -> Generation:
    (completion,) = output.outputs
    ids = tuple(completion.token_ids)
    if completion.finish_reason == "stop":
        return Generation(request.sample, request.variant, ids[:-1], "stop")
    return Generation(request.sample, request.variant, ids, "length")


def _not_started(spec: EngineSpec, error: Exception) -> ModelError:
    text = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else str(error)
    reason = text.strip().split("\n")[0][:300] or type(error).__name__
    if spec.adapter is not None and "lora" in reason.lower():
        return _not_served(spec, reason)
    return ModelError(
        f"vLLM can't load `{spec.model.source}`: {reason}",
        "try --engine transformers; or, where memory is short, a smaller --batch_size or --max_model_len",
    )


def _not_served(spec: EngineSpec, reason: str) -> AdapterRefusedError:
    return AdapterRefusedError(
        f"vLLM can't serve the adapter `{spec.adapter}` on `{spec.model.source}`: {reason}",
        "evaluate what `tunesmith convert` makes of it, or use --engine transformers",
    )
