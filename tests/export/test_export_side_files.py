"""What lies beside a model's weights goes with its export: tokenizer, processors, code, terms; and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from support.commands import run_python
from support.exports import convert, tuned_of
from support.hub import serve_hub
from support.runs import small_config, start, train_here
from support.tiny_models import save_model
from support.tokenizers import CHATML_TEMPLATE, build_tokenizer
from tunesmith.config import ModelRef
from tunesmith.export.final import write_final
from tunesmith.runs.tuned import TunedModel

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.slow]

OF_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "qwen.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
)
OF_MODEL = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "processing_own.py",
    "LICENSE",
    "LICENSE-APACHE-2.0",
    "License.txt",
    "NOTICE.md",
    "USE_POLICY.md",
    "GEMMA_TERMS.txt",
)
LEFT_BEHIND = (
    "README.md",
    ".env",
    ".gitattributes",
    "training_args.bin",
    "trainer_state.json",
    "optimizer.pt",
    "rows.jsonl",
    "secrets.json",
    "params.json",
    "config.json.bak",
    "license_scores.jsonl",
    "original/tokenizer.model",
    "original/preprocessor_config.json",
    "pytorch_model.bin.index.json",
    "figure.png",
)
MADE = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tunesmith.json"}


def publish(folder: Path) -> Path:
    save_model(folder, build_tokenizer("chatml"))
    for name in (*OF_TOKENIZER, *OF_MODEL, *LEFT_BEHIND):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".json" and not path.exists():
            path.write_text('{ "eos_token":"<|im_end|>" }' if name == "special_tokens_map.json" else "{  }")
        elif not path.exists():
            path.write_text(f"{name}\r\n")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML_TEMPLATE}, indent=7))
    return folder


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("models") / "base")


@pytest.mark.parametrize("full_ft", [False, True])
def test_checkpoint_final_and_export_have_the_published_files(
    full_ft: bool, base: Path, rows: Path, tmp_path: Path
) -> None:
    config = small_config(
        base, rows, tmp_path / "home", max_steps=1, full_ft=full_ft, eval_steps=0, save_steps=0
    )
    run = train_here(start(config))
    tuned = tuned_of(run)
    write_final(run, ModelRef(base))
    folders = {
        "checkpoint": tuned.folder,
        "final": run.final_path,
        "export": convert(tuned, tmp_path / "out"),
    }
    if not full_ft:
        folders["alone"] = convert(tuned, tmp_path / "alone", no_merge=True)
    for place, folder in folders.items():
        is_model = place == "export" or (place == "final" and full_ft)
        expected = {*OF_TOKENIZER, *(OF_MODEL if is_model else ())}
        assert {name for name in names_in(folder) if (base / name).exists()} - MADE - {
            "params.json",
            "trainer_state.json",
        } == expected
        for name in expected:
            assert (folder / name).read_bytes() == (base / name).read_bytes(), name
        if is_model:
            assert names_in(folder) - {"README.md"} == {*expected, *MADE} - {"README.md"}


def test_a_chat_template_of_the_run_goes_into_final_and_export(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    given = "{# given #}" + CHATML_TEMPLATE
    config = small_config(
        base, rows, tmp_path / "home", max_steps=1, eval_steps=0, save_steps=0, chat_template=given
    )
    run = train_here(start(config))
    tuned = tuned_of(run)
    write_final(run, ModelRef(base))
    for folder in (tuned.folder, run.final_path, convert(tuned, tmp_path / "out")):
        assert AutoTokenizer.from_pretrained(folder).chat_template == given
        assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        assert json.loads((folder / "chat_template.json").read_text()) == {"chat_template": given}
        assert not (folder / "additional_chat_templates").exists()


def test_a_whole_model_passes_on_what_it_has(base: Path, tmp_path: Path) -> None:
    folder = convert(TunedModel("model", base, None), tmp_path / "out")
    for name in (*OF_TOKENIZER, *OF_MODEL):
        assert (folder / name).read_bytes() == (base / name).read_bytes(), name


COPY = """
import json, sys
from pathlib import Path
from tunesmith.config import ModelRef
from tunesmith.model.files.side_files import CODE, PROCESSORS, TERMS, TOKENIZER, copy_files
print(json.dumps(sorted(copy_files(ModelRef("org/base"), (*TOKENIZER, *PROCESSORS, *CODE, *TERMS), Path(sys.argv[1])))))
"""


def test_a_model_of_the_hub_is_asked_for_all_of_them(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "hub/org/base")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with serve_hub(tmp_path / "hub") as (endpoint, _):
        settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
        copied = run_python(COPY, first, HF_HUB_OFFLINE="0", **settings)
    assert set(copied) == {*OF_TOKENIZER, *OF_MODEL}
    # What has been fetched is there without the hub too.
    assert run_python(COPY, second, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home")) == copied
    for name in copied:
        assert (first / name).read_bytes() == (second / name).read_bytes() == (base / name).read_bytes()
