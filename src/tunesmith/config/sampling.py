"""How an answer's tokens are chosen, wherever one is generated."""

from __future__ import annotations

from tunesmith.config.declare import Settings, setting


class SamplingConfig(Settings):
    """How the tokens of an answer are chosen."""

    max_tokens: int = setting(512, "Tokens of an answer at most.", group="generation", scope="run", ge=1)
    temperature: float = setting(
        0.0, "Sampling temperature; 0 takes the likeliest token.", group="generation", scope="run", ge=0, le=2
    )
    top_k: int = setting(0, "Tokens to sample from; 0 takes them all.", group="generation", scope="run", ge=0)
    top_p: float = setting(
        1.0,
        "Share of the probability to sample from; 1 takes it all.",
        group="generation",
        scope="run",
        gt=0,
        le=1,
    )
