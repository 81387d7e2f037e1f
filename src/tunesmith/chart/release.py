"""A training as a release of the Helm chart: rendered, or installed."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tunesmith.chart.helm import CHART, install, merge_values, template
from tunesmith.chart.places import check_addresses, refuse_relative_paths, warn_of_unmounted_paths
from tunesmith.chart.schema import SUBDOMAIN
from tunesmith.config import TrainConfig
from tunesmith.config.yaml_file import write_yaml
from tunesmith.errors import ConfigError

logger = logging.getLogger(__name__)

_LONGEST_NAME = 53
_GPU = re.compile(r"gpu$|^nvidia\.com/mig-")


@dataclass(frozen=True)
class Release:
    """A run config with the cluster's side of it: Helm's values files and `--set` assignments.

    `config_path` is the YAML file that the config was read from, if any.
    """

    name: str
    config: TrainConfig
    config_path: Path | None = None
    namespace: str | None = None
    values: tuple[Path, ...] = ()
    assignments: tuple[str, ...] = ()


def choose_name(given: str | None, config: TrainConfig, config_path: Path | None) -> str:
    """Return the name given, else one of `run_name`, the YAML file's or the model's, in the characters of a release's.

    Raises:
        ConfigError: the name can't be a release's.
    """
    if given is not None:
        if len(given) > _LONGEST_NAME or not re.fullmatch(SUBDOMAIN, given):
            raise ConfigError(
                f"`--release` is `{given}`; it must be of a-z, 0-9, dashes and dots, at most {_LONGEST_NAME} characters",
                "write it as my-run",
            )
        return given
    source = config.run_name or (config_path.stem if config_path else config.model.name)
    name = re.sub("[^a-z0-9]+", "-", source.lower())[:_LONGEST_NAME].strip("-")
    if not name:
        raise ConfigError(f"`{source}` makes no name of a release", "give one: --release my-run")
    return name


def render(release: Release) -> str:
    """Return the release's manifests, as `helm template` prints them.

    Raises:
        ConfigError: there is no Helm, or settings or values can't work on a cluster.
    """
    with _helm_words(release) as words:
        return template(words)


def submit(release: Release) -> str:
    """Install the release with Helm, and return what it prints: the status, and how to follow the job.

    Raises:
        ConfigError: as `render` says, or there is a release of this name.
        SubmitError: the cluster can't be reached, or refuses the release.
    """
    with _helm_words(release) as words:
        template(words)  # whose errors are the values', before the cluster has a say
        check_addresses(release.config)
        return install(words, release.namespace)


@contextmanager
def _helm_words(release: Release) -> Iterator[list[str]]:
    """Yield what follows `helm template` and `helm install`: name, chart, namespace, values."""
    _check_given(release)
    refuse_relative_paths(release.config, own_home=True)
    given = [word for path in release.values for word in ("--values", str(path))]
    assigned = [word for assignment in release.assignments for word in ("--set", assignment)]
    with TemporaryDirectory() as name:
        folder = Path(name)
        values = merge_values([*given, *assigned], folder / "merging")
        _check_merged(release, values)
        claims = values.get("pvc") or []
        warn_of_unmounted_paths(release.config, [str(claim["mount_path"]) for claim in claims])
        _warn_without_gpus(release.config, values)
        run = [word for path in _write_run(release.config, folder) for word in ("--values", str(path))]
        namespace = ["--namespace", release.namespace] if release.namespace else []
        yield [release.name, str(_stage_chart(values, folder)), *namespace, *given, *run, *assigned]


def _check_given(release: Release) -> None:
    if not release.config.model_fields_set:
        raise ConfigError(
            "no setting of the training is given", "give a YAML file or flags: `tunesmith submit run.yaml`"
        )
    if not CHART.is_dir():
        raise ConfigError(
            f"this tunesmith has no chart at `{CHART}`", "install it from a wheel or a checkout"
        )
    for path in release.values:
        if not path.is_file():  # a pipe could be read only once
            raise ConfigError(f"there is no values file `{path}`", "--values takes the path of a YAML file")
    for assignment in release.assignments:
        if re.search(r"(^|,)run[.=\[]", assignment):
            raise ConfigError(f"`--set {assignment}` changes `run`", "give settings as flags: --lora_rank 16")


def _check_merged(release: Release, values: dict[str, Any]) -> None:
    """Refuse values that would train something else than the release's config."""
    if (values.get("train") or {}).get("command"):
        raise ConfigError(
            "`train.command` of the values says what is trained, and the training config wouldn't count",
            "leave `train.command` and `train.args` out of the values; or install the values with helm",
        )
    serve = values.get("serve") or {}
    if serve.get("enabled") and not serve.get("train_too"):
        raise ConfigError(
            "the values serve a model (`serve.enabled`) and train nothing",
            "install them with helm; or set `serve.train_too: true` to train besides",
        )
    if values.get("run") and release.config_path is None:
        raise ConfigError(
            "the values hold a training config of their own, `run`, which flags alone can't change",
            "put it in a YAML file: `tunesmith submit run.yaml -f values.yaml`; or install the values with helm",
        )
    if values.get("run"):
        logger.info("`run` of the values gives way to `%s`", release.config_path)


def _warn_without_gpus(config: TrainConfig, values: dict[str, Any]) -> None:
    limits = values["resources"].get("limits") or {}
    if config.use_gpu is not False and not any(_GPU.search(name) for name in limits):
        logger.warning(
            "warning: the workers ask for no GPU: give `resources` of the values some (nvidia.com/gpu: 8), or say "
            "--use_gpu=false if CPUs are meant"
        )


def _write_run(config: TrainConfig, folder: Path) -> list[Path]:
    """Write values files that make `run` the settings given, and nothing else: the first takes away what is there."""
    settings = config.model_dump(mode="json", exclude_unset=True)
    files = {folder / "no_run.yaml": None, folder / "run.yaml": settings}
    for path, run in files.items():
        path.write_text(write_yaml({"run": run}), encoding="utf-8")
    return list(files)


def _stage_chart(values: dict[str, Any], folder: Path) -> Path:
    """Return the chart's folder: a copy with the package's zip, where the values ask for that."""
    if not (values.get("package") or {}).get("fromConfigMap"):
        return CHART
    from tunesmith.chart.package import package_zip

    chart = folder / CHART.name
    shutil.copytree(CHART, chart)
    (chart / "files" / "tunesmith.zip").write_bytes(package_zip())
    return chart
