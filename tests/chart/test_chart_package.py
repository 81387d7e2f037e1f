"""The package from a ConfigMap: a zip in the chart, on the PYTHONPATH of every pod, that runs as it is."""

from __future__ import annotations

import ast
import base64
import gzip
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement

import tunesmith
from support.helm import CHART, chart_for, container_of, pods_of, rayjob_of, render, render_job, run_helm
from support.paths import REPOSITORY
from tunesmith.chart.package import package_zip, requirements, sources_zip

ZIP = "/etc/tunesmith-package/tunesmith.zip"
MIB = 1 << 20

# Without `site`, the installed package isn't found; its dependencies are, by PYTHONPATH.
PYTHON = [sys.executable, "-S"]

IMPORT_ALL = """
import importlib, pkgutil, tunesmith
assert ".zip" in tunesmith.__file__, tunesmith.__file__
names = [module.name for module in pkgutil.walk_packages(tunesmith.__path__, "tunesmith.")]
for name in names:
    if name != "tunesmith.__main__":
        importlib.import_module(name)
print(len(names))
"""

# Encodes in two other processes, which the Python of the last word starts.
PREPARE = """
import sys
from pathlib import Path
from tunesmith.config import TrainConfig
from tunesmith.data import token_files
from tunesmith.data.prepare import prepare
from tunesmith.model.load import load_tokenizer

config = TrainConfig(model_path=sys.argv[1], dataset_name=sys.argv[2], input_template="{question}",
                     output_template="{answer}", max_seq_length=96, num_proc=2)
token_files._ROWS_PER_PROCESS = 10
sys.executable = sys.argv[4]
prepare(config, load_tokenizer(config.model), Path(sys.argv[3]))
"""

REPORT = """
from tunesmith.view import page
print(*(len(page._read("tunesmith.evaluate", f"report.{suffix}")) for suffix in ("html", "css", "js")))
"""


def test_the_zip_holds_the_package_and_nothing_else() -> None:
    archive = ZipFile(io.BytesIO(sources_zip()))
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src/tunesmith"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    # The link to the chart is one entry.
    files = {name for name in listed.stdout.split() if (REPOSITORY / name).is_file()}
    assert set(archive.namelist()) == {name.removeprefix("src/") for name in files}
    for name in archive.namelist():
        if not name.endswith(".py"):
            assert archive.read(name) == (REPOSITORY / "src" / name).read_bytes()


def test_the_same_sources_make_the_same_zip_in_another_folder(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "src" / "tunesmith", tmp_path / "tunesmith")
    for path in tmp_path.rglob("*.py"):
        os.utime(path, (0, 0))
    written = tmp_path / "written.zip"
    subprocess.run(
        [sys.executable, "-m", "tunesmith.chart.package", str(written)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
    )
    assert written.read_bytes() == package_zip()


def test_what_runs_is_in_it_line_by_line_and_no_more() -> None:
    """A traceback in a pod names the lines of the source."""
    with ZipFile(io.BytesIO(sources_zip())) as archive:
        packed = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}
    for name, text in packed.items():
        source = (REPOSITORY / "src" / name).read_text()
        own, theirs = (
            [(type(node), getattr(node, "lineno", 0)) for node in ast.walk(ast.parse(it))]
            for it in (source, text)
        )
        assert own == theirs, name
    assert sum(map(len, packed.values())) < 0.9 * sum(
        len((REPOSITORY / "src" / name).read_text()) for name in packed
    )


def test_a_config_map_and_helms_own_record_hold_it() -> None:
    """The API server refuses more than 1 MiB in either; Helm keeps the chart and what it rendered in a secret."""
    values = {"package": {"fromConfigMap": True}}
    assert len(base64.b64encode(package_zip())) < 0.5 * MIB
    install = ["install", "my-run", str(chart_for(values)), "--dry-run=client", "-o", "json", "-f", "-"]
    release = run_helm(*install, values=values)
    assert release.returncode == 0, release.stderr
    assert json.loads(release.stdout)["chart"]["files"], "the record holds the chart's files"
    assert len(base64.b64encode(gzip.compress(release.stdout.encode()))) < 0.92 * MIB


def test_head_and_workers_mount_it_and_find_it_first() -> None:
    manifests = render({"package": {"fromConfigMap": True}})
    package = next(m for m in manifests if m["metadata"]["name"] == "rayjob-my-run-package")
    assert base64.b64decode(package["binaryData"]["tunesmith.zip"]) == package_zip()
    pods = pods_of(rayjob_of(manifests))
    for component in ("head", "worker"):
        mount = next(m for m in container_of(pods[component])["volumeMounts"] if m["name"] == "package")
        assert mount["readOnly"]
        volume = next(v for v in pods[component]["spec"]["volumes"] if v["name"] == "package")
        assert volume["configMap"]["name"] == "rayjob-my-run-package"
        assert f"{mount['mountPath']}/tunesmith.zip" == ZIP
    for pod in pods.values():
        assert {"name": "PYTHONPATH", "value": ZIP} in container_of(pod)["env"]


@pytest.mark.parametrize(
    ("given", "value"), [("/a:/b", f"{ZIP}:/a:/b"), ("$(A)/c", f"{ZIP}:$(A)/c"), ("", ZIP)]
)
def test_a_python_path_of_train_env_comes_after_it_where_it_stood(given: str, value: str) -> None:
    env = [{"name": "A", "value": "1"}, {"name": "PYTHONPATH", "value": given}, {"name": "B", "value": "2"}]
    job = render_job({"pvc": [], "package": {"fromConfigMap": True}, "train": {"env": env}})
    expected = [env[0], {"name": "PYTHONPATH", "value": value}, env[2]]
    assert container_of(pods_of(job)["worker"])["env"][:3] == expected


@pytest.mark.parametrize("package", [None, {}, {"fromConfigMap": None}, {"fromConfigMap": False}])
def test_without_it_nothing_changes(package: object) -> None:
    assert render({"package": package}) == render({})
    assert "tunesmith-package" not in json.dumps(render({}))


def test_a_chart_without_the_zip_says_how_to_make_it(tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / "raytrain")
    (chart / "files" / "tunesmith.zip").unlink(missing_ok=True)
    done = run_helm("template", "a", str(chart), "--set", "package.fromConfigMap=true")
    assert done.returncode != 0
    assert "package.fromConfigMap" in done.stderr
    command = re.search("`python (-m tunesmith.chart.package .*)`", done.stderr)
    assert command is not None
    (tmp_path / "charts").mkdir()
    chart.rename(tmp_path / "charts" / "raytrain")
    subprocess.run([sys.executable, *command[1].split()], cwd=tmp_path, check=True)
    done = run_helm(
        "template", "a", str(tmp_path / "charts" / "raytrain"), "--set", "package.fromConfigMap=true"
    )
    assert done.returncode == 0, done.stderr


def test_the_requirements_are_those_declared_in_versions_that_are_pinned() -> None:
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {requirement.name: requirement for requirement in map(Requirement, declared)}
    listed = dict(line.split("==") for line in requirements())
    assert set(listed) == set(wanted) - {"ray"}
    pins = (REPOSITORY / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    for name, version in listed.items():
        assert wanted[name].specifier.contains(version)
        assert f"{name}=={version}" in pins


def test_the_requirements_are_printed_as_values_that_the_chart_takes() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "tunesmith.chart.package", "--requirements"],
        capture_output=True,
        text=True,
        check=True,
    )
    job = render_job(yaml.safe_load(printed.stdout))
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"pip": requirements()}


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip as a pod finds it: a file of a ConfigMap is a link by way of another link."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "..2026_11_22").mkdir()
    (folder / "..2026_11_22" / "tunesmith.zip").write_bytes(package_zip())
    (folder / "..data").symlink_to("..2026_11_22")
    (folder / "tunesmith.zip").symlink_to("..data/tunesmith.zip")
    return folder / "tunesmith.zip"


def run_zipped(zipped: Path, *words: str, cwd: Path) -> str:
    """Run Python with the zip and this environment's packages, but not the installed one."""
    path = os.pathsep.join([str(zipped), sysconfig.get_paths()["purelib"]])
    environ = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([*PYTHON, *words], env=environ, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_runs_from_the_zip(zipped: Path, tmp_path: Path) -> None:
    version = run_zipped(zipped, "-m", "tunesmith", "--version", cwd=tmp_path)
    assert version == f"tunesmith {tunesmith.__version__}\n"
    schema = json.loads(run_zipped(zipped, "-m", "tunesmith", "schema", "train", cwd=tmp_path))
    assert "lora_rank" in schema["properties"]


@pytest.mark.slow
def test_every_module_and_its_files_are_read_from_the_zip(zipped: Path, tmp_path: Path) -> None:
    num_modules = len(
        [name for name in ZipFile(io.BytesIO(sources_zip())).namelist() if name.endswith(".py")]
    )
    assert int(run_zipped(zipped, "-c", IMPORT_ALL, cwd=tmp_path)) == num_modules - 1
    assert all(int(size) > 100 for size in run_zipped(zipped, "-c", REPORT, cwd=tmp_path).split())


@pytest.mark.slow
def test_processes_that_encode_find_the_zip_too(
    zipped: Path, model_of: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/started\nexec {shlex.join(PYTHON)} "$@"\n')
    python.chmod(0o755)
    words = [str(model_of("llama")), str(rows), str(tmp_path / "datasets"), str(python)]
    run_zipped(zipped, "-c", PREPARE, *words, cwd=tmp_path)
    assert (tmp_path / "started").read_text().count("-m tunesmith.data.token_files") == 2
