"""A package that only the driver's node has: real Ray workers that can't import it say where it belongs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from support.exports import write_adapter
from support.long import long_but
from support.runs import small_config
from tunesmith.api import convert, fine_tune
from tunesmith.chart.package import package_zip
from tunesmith.cluster.pool import RayPool
from tunesmith.cluster.resources import connected_nodes
from tunesmith.config import ConvertConfig, ModelRef
from tunesmith.errors import EvaluationError, ExportError, TrainingError, TunesmithError
from tunesmith.evaluate.engines.base import EngineSpec
from tunesmith.failures import find_failed_import
from tunesmith.signals import signal_handlers_kept

ModelOf = Callable[[str], Path]

# Read by Python at its start, it makes a package look as if it weren't installed, unless it is there as a zip.
HIDING = """
import sys
from importlib.machinery import PathFinder


class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        is_hidden = name.split(".")[0] == "HIDDEN" and ".zip" not in str(spec and spec.origin)
        return None if is_hidden else spec


sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.mark.parametrize(
    ("error", "failed_import"),
    [
        (ModuleNotFoundError("No module named 'a'"), "ModuleNotFoundError: No module named 'a'"),
        (RuntimeError("can't read it\n  line\nImportError: no `b`"), "ImportError: no `b`"),
        (RuntimeError("ImportError: no `b`, and yet\nValueError: c"), None),
        (RuntimeError(), None),
    ],
)
def test_a_failed_import_is_known_from_the_end_of_a_traceback_too(
    error: Exception, failed_import: str | None
) -> None:
    assert find_failed_import(error) == failed_import


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    with signal_handlers_kept(), ExitStack() as stack:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        stack.callback(cluster.shutdown)
        yield cluster


@contextmanager
def without(package: str, head: Cluster, folder: Path, *path: Path) -> Iterator[None]:
    """Let the cluster's only worker node lack a package; `path` is the rest of its PYTHONPATH."""
    (folder / "sitecustomize.py").write_text(HIDING.replace("HIDDEN", package))
    node = head.add_node(num_cpus=1, env_vars={"PYTHONPATH": os.pathsep.join(map(str, [folder, *path]))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", head.address)
        yield
    head.remove_node(node)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("package", long_but(["tunesmith"], ["tunesmith", "peft"]))
def test_a_training_says_what_its_workers_lack(
    package: str, head: Cluster, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    config = small_config(model_of("llama"), rows, tmp_path / "home", num_workers=1, max_failures=0)
    with without(package, head, tmp_path), pytest.raises(TrainingError) as error:
        fine_tune(config)
    assert error.value.message == f"training failed: ModuleNotFoundError: No module named '{package}'"
    assert_says_where_it_belongs(error.value)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_train_with_the_package_from_its_zip(
    head: Cluster, model_of: ModelOf, rows: Path, tmp_path: Path
) -> None:
    zipped = tmp_path / "tunesmith.zip"
    zipped.write_bytes(package_zip())
    config = small_config(model_of("llama"), rows, tmp_path / "home", num_workers=1)
    with without("tunesmith", head, tmp_path, zipped):
        assert fine_tune(config).ending == "finished"


@pytest.mark.ray
@pytest.mark.slow
def test_a_conversion_and_an_evaluation_say_so_too(head: Cluster, model_of: ModelOf, tmp_path: Path) -> None:
    adapter = write_adapter(model_of("llama"), tmp_path / "adapter", target_modules=["q_proj"]).folder
    pool = RayPool(1, use_gpu=False, num_threads=1, gpus_each=0, cpus_each=1)
    spec = EngineSpec(ModelRef(model_of("llama")), None, "float32", 64, 8, 0.0, 0, 1.0, (0,), 0, 1, 1)
    with without("tunesmith", head, tmp_path), connected_nodes():
        with pytest.raises(ExportError, match="No module named 'tunesmith'") as failed_export:
            convert(ConvertConfig(checkpoints_dir=str(adapter)))
        with (
            pytest.raises(EvaluationError, match="No module named 'tunesmith'") as failed_evaluation,
            pool.load("transformers", spec),
        ):
            pass
    for error in (failed_export.value, failed_evaluation.value):
        assert_says_where_it_belongs(error)


def assert_says_where_it_belongs(error: TunesmithError) -> None:
    assert error.exit_code == 1
    assert error.hint is not None
    assert "ray.runtime_env_yaml" in error.hint and "pre_script" in error.hint
