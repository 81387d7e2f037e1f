"""Generation with transformers: what evaluates where vLLM isn't installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunesmith.evaluate.engines.base import EngineSpec, Generation, Request, Variant
from tunesmith.evaluate.engines.sampling import sample_seed, sampling_processors

if TYPE_CHECKING:
    import torch


class TransformersEngine:
    """Generates in batches of requests of like length, padded on the left."""

    name = "transformers"

    def __init__(self, spec: EngineSpec) -> None:
        import torch

        from tunesmith.model.adapters.folder import leaves_base, stands_before_prompt
        from tunesmith.model.adapters.lora import apply_adapter

        self._spec = spec
        if spec.num_threads is not None:
            torch.set_num_threads(spec.num_threads)
        self._device = torch.device("cuda" if spec.use_gpu else "cpu")
        self._model: Any = self._load()
        self._leaves_base, self._batch_size = True, spec.batch_size
        if spec.adapter is not None:
            if stands_before_prompt(spec.adapter):
                self._batch_size = 1  # PEFT puts it before the padding
            self._leaves_base = leaves_base(self._model, spec.adapter)
            self._model = apply_adapter(self._model, spec.adapter)
        self._base: Any = None

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Generation]]:
        # The longest first: whether a batch fits in memory shows at once, and the estimated time only falls.
        ordered = sorted(requests, key=lambda request: (request.variant, -len(request.prompt_ids)))
        for variant in ("base", "tuned"):
            of_variant = [request for request in ordered if request.variant == variant]
            for start in range(0, len(of_variant), self._batch_size):
                yield self._generate_batch(of_variant[start : start + self._batch_size], variant)

    def stream(self, request: Request, take: Callable[[int], None]) -> Generation:
        """Generate for one request, and hand `take` each token as it comes, the stop token too."""
        (generation,) = self._generate_batch([request], request.variant, _Streamer(take))
        return generation

    def close(self) -> None:
        import torch

        self._model = self._base = None
        if self._spec.use_gpu:
            torch.cuda.empty_cache()

    def _generate_batch(
        self, batch: Sequence[Request], variant: Variant, streamer: _Streamer | None = None
    ) -> list[Generation]:
        import torch

        longest = max(len(request.prompt_ids) for request in batch)
        pad_id = self._spec.stop_token_ids[0]
        input_ids_BT = torch.full((len(batch), longest), pad_id, dtype=torch.long)
        mask_BT = torch.zeros_like(input_ids_BT)
        for row, request in enumerate(batch):
            start = longest - len(request.prompt_ids)
            input_ids_BT[row, start:] = torch.tensor(request.prompt_ids)
            mask_BT[row, start:] = 1
        rooms = [self._room(request) for request in batch]
        with torch.inference_mode(), self._model_of(variant) as model:
            output_BT: torch.Tensor = model.generate(
                input_ids=input_ids_BT.to(self._device),
                attention_mask=mask_BT.to(self._device),
                generation_config=self._generation_config(max(rooms)),
                logits_processor=self._processors(batch, longest, max(rooms)),
                streamer=streamer,
            )
        answers = zip(batch, rooms, output_BT[:, longest:].tolist(), strict=True)
        return [_generation(request, ids[:room], self._spec.stop_token_ids) for request, room, ids in answers]

    def _load(self) -> Any:
        import torch
        from transformers import GenerationConfig

        from tunesmith.model.load import load_model
        from tunesmith.model.probe import attend_eagerly, attends_rightly
        from tunesmith.parallel.replicate import replicate_model

        dtype: torch.dtype = getattr(torch, self._spec.dtype)
        model = load_model(self._spec.model, self._device, dtype).requires_grad_(False).eval()
        # As training casts: a cast of the whole model would round its rotary frequencies too.
        replicate_model(model, self._device, dtype)
        if not attends_rightly(model, self._device):
            attend_eagerly(model)
        # A model's own may hold penalties, with which greedy wouldn't be greedy.
        model.generation_config = GenerationConfig()
        return model

    @contextmanager
    def _model_of(self, variant: Variant) -> Iterator[Any]:
        """Give the model that answers as the variant: the base is the base's own, whatever the adapter changed."""
        if variant == "tuned" or self._spec.adapter is None:
            yield self._model
        elif self._leaves_base:
            with self._model.disable_adapter():
                yield self._model
        else:
            if self._base is None:
                self._base = self._load()
            yield self._base

    def _room(self, request: Request) -> int:
        """Return how many tokens the answer may have."""
        return min(self._spec.max_tokens, self._spec.max_model_len - len(request.prompt_ids))

    def _processors(self, batch: Sequence[Request], prompt_length: int, num_tokens: int) -> Any:
        from transformers import LogitsProcessorList

        spec = self._spec
        if spec.temperature == 0:
            return None
        seeds = [sample_seed(spec.seed, request.sample) for request in batch]
        return LogitsProcessorList(
            sampling_processors(seeds, prompt_length, num_tokens, spec.temperature, spec.top_k, spec.top_p)
        )

    def _generation_config(self, max_new_tokens: int) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self._spec.stop_token_ids),
            pad_token_id=self._spec.stop_token_ids[0],
            do_sample=False,  # sampled answers are chosen by the processors, row by row
        )


class _Streamer:
    """What transformers hands the prompt to, and then each token."""

    def __init__(self, take: Callable[[int], None]) -> None:
        self._take = take
        self._has_prompt = False

    def put(self, ids: torch.Tensor) -> None:
        if self._has_prompt:
            self._take(int(ids))
        self._has_prompt = True

    def end(self) -> None:
        pass


def _generation(request: Request, ids: list[int], stop_token_ids: Sequence[int]) -> Generation:
    stops = [position for position, token in enumerate(ids) if token in stop_token_ids]
    kept = ids[: stops[0]] if stops else ids
    return Generation(request.sample, request.variant, tuple(kept), "stop" if stops else "length")
