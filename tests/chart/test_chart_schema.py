"""The schema of the chart's values, and the chart's own record of what it belongs to."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import jsonschema
import yaml

import tunesmith
from support.helm import CHART
from support.paths import REPOSITORY
from tunesmith.chart.schema import values_schema
from tunesmith.config import TrainConfig
from tunesmith.config.reference import json_schema

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def test_the_schema_is_current() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "tunesmith.chart.schema"], capture_output=True, text=True, check=True
    )
    written = (CHART / "values.schema.json").read_text()
    assert written == printed.stdout, "python -m tunesmith.chart.schema > charts/raytrain/values.schema.json"


def test_the_schema_is_one_and_takes_the_defaults() -> None:
    jsonschema.Draft7Validator.check_schema(values_schema())
    jsonschema.validate(VALUES, values_schema())


def test_run_takes_what_the_command_takes() -> None:
    assert values_schema()["properties"]["run"]["properties"] == json_schema(TrainConfig)["properties"]


def test_every_value_is_explained_where_it_stands() -> None:
    """The keys of the schema are those of values.yaml, its explanations of optional groups included."""
    text = (CHART / "values.yaml").read_text()
    schema = values_schema()["properties"]
    assert set(schema) - {"global"} == set(VALUES)
    for group in set(schema) - {"run", "global"}:
        for name in _names_below(schema[group]):
            assert re.search(rf"\b{re.escape(name)}\b", text), f"{group}.{name} isn't explained"


def _names_below(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    names = set(schema.get("properties", {}))
    inner = [*schema.get("properties", {}).values(), schema.get("items"), *schema.get("anyOf", [])]
    # Objects of Kubernetes, as it knows them.
    return names.union(*(_names_below(value) for value in inner)) - {
        "operator",
        "effect",
        "tolerationSeconds",
        "key",
    }


def test_the_chart_belongs_to_this_package_and_its_ray() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == tunesmith.__version__
    pins = (REPOSITORY / "constraints.txt").read_text()
    assert f"\nray=={VALUES['ray']['version']}\n" in pins
