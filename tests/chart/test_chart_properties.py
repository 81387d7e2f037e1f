"""Whatever values the schema accepts, the chart renders valid objects of them, with every text as it was."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.helm import Values, container_of, pods_of, rayjob_of, read_manifests, template
from support.kuberay import crd_is_at_hand, find_core_errors, find_crd_errors, find_kuberay_errors
from tunesmith.chart.schema import values_schema
from tunesmith.config.yaml_file import read_yaml_mapping

# What YAML, templates and shells give a meaning to.
NASTY = st.text(st.sampled_from(" \t\n\r'\":{}[]#-&*!|>%@`\\,?~=$();<>aé😀0"), max_size=20) | st.sampled_from(
    [
        "{{ fail `x` }}",
        "{{",
        "no",
        "null",
        "1e3",
        "0x10",
        "12:30",
        "2020-01-01",
        "---\na: b",
        "'",
        '"',
        "\n",
        "=",
        "<<",
    ]
)
ASCII = st.characters(min_codepoint=32, max_codepoint=126)
WHOLE = st.integers(-(2**53) + 1, 2**53 - 1)
FREE_OBJECTS = st.dictionaries(st.sampled_from(["priorityClassName", "hostname"]), NASTY, max_size=1)


def values_of(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return what generates instances of the schema, as far as the chart's schema goes."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([values_of(branch) for branch in schema["anyOf"]])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of([_values_of_kind(kind, schema) for kind in kinds])


def _values_of_kind(kind: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    if kind == "object" and "properties" in schema:
        required = schema.get("required", [])
        known = {name: values_of(value) for name, value in schema["properties"].items()}
        return st.fixed_dictionaries(
            {name: known[name] for name in required},
            optional={name: value for name, value in known.items() if name not in required},
        )
    if kind == "object":
        names = schema.get("propertyNames", {}).get("pattern")
        named = (
            st.sampled_from(["cpu", "memory", "ephemeral-storage"]) if names else st.text(ASCII, min_size=1)
        )
        entries = schema.get("additionalProperties")
        return st.dictionaries(named, values_of(entries), max_size=2) if entries else FREE_OBJECTS
    if kind == "array":
        return st.lists(values_of(schema["items"]), min_size=schema.get("minItems", 0), max_size=3)
    if kind == "string":
        longest = schema.get("maxLength", 40)
        if "pattern" in schema:
            made = st.from_regex(schema["pattern"], fullmatch=True, alphabet=ASCII)
            return made.filter(lambda text: len(text) <= longest)
        return NASTY.filter(lambda text: len(text) >= schema.get("minLength", 0))
    plain: dict[str, st.SearchStrategy[Any]] = {
        "integer": st.integers(schema.get("minimum", -(2**53) + 1), schema.get("maximum", 2**53 - 1)),
        "number": st.sampled_from([0.25, 0.5])
        if "maximum" in schema or "exclusiveMaximum" in schema
        else WHOLE.filter(lambda number: number > 0) | st.sampled_from([0.25, 0.5]),
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return plain[kind]


def a_part_of(schema: dict[str, Any]) -> st.SearchStrategy[Values]:
    """Return what generates values files: `ray` and `resources` come whole, of the others a few."""
    keys = {name: values_of(value) for name, value in schema["properties"].items() if name != "global"}
    few = st.sets(st.sampled_from(sorted(keys)), max_size=6)
    return few.flatmap(lambda names: st.fixed_dictionaries({name: keys[name] for name in sorted(names)}))


SCHEMA = values_schema()
# A framework must be there, and an expression in env is one.
SCHEMA["properties"]["framework"] = {"enum": ["ray_train", "", None]}


def without_expressions(values: Values) -> Values:
    of_train, of_serve = ((values.get(name) or {}).get("env") or [] for name in ("train", "serve"))
    for entry in [*of_train, *of_serve]:
        if isinstance(entry.get("value"), str):
            entry["value"] = entry["value"].replace("{{", "{ {")
    return values


def check(values: Values) -> None:
    done = template(values)
    if done.returncode:
        # Values that don't go together; anything else is a fault of the templates.
        assert "execution error at" in done.stderr or "don't meet the specifications" in done.stderr, (
            done.stderr
        )
        return
    manifests = read_manifests(done.stdout)
    served = [m for m in manifests if m["kind"] in ("Deployment", "Service")]
    serve = values.get("serve") or {}
    assert len(served) == (2 if serve.get("enabled") else 0)
    if "podSpec" not in str(serve) and "valueFrom" not in str(serve):
        assert [error for manifest in served for error in find_core_errors(manifest)] == []
    manifests = [manifest for manifest in manifests if manifest not in served]
    if served and not serve.get("train_too"):
        assert [m["kind"] for m in manifests] in ([], ["ConfigMap"])
        return
    job = rayjob_of(manifests)
    assert find_kuberay_errors(job) == []
    if crd_is_at_hand() and not any(free in str(values) for free in ("podSpec", "valueFrom")):
        assert find_crd_errors(job) == []
    for manifest in manifests[:-1]:
        assert find_core_errors(manifest) == []
    files = next(m["data"] for m in manifests if m["metadata"]["name"].endswith("-job"))
    with NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(files["run.yaml"])
        file.flush()
        assert read_yaml_mapping(Path(file.name)) == (values.get("run") or {})
    for name in ("inline_script", "pre_script", "post_script"):
        if given := values.get(name):
            assert files[f"{name}.sh"] == joined(given, "\n")
    train = values.get("train") or {}
    if command := joined(train.get("command"), " "):
        expected = " ".join(filter(None, [command, joined(train.get("args"), " ")]))
        # Empty lines at its end mean nothing to a shell, and YAML's writer may add one.
        assert files["train.sh"].rstrip("\n") == expected.rstrip("\n")
    for pod in pods_of(job).values():
        env = {entry["name"]: entry.get("value") for entry in container_of(pod)["env"]}
        for entry in {entry["name"]: entry for entry in train.get("env") or []}.values():
            assert entry.get("valueFrom") or env[entry["name"]] == text_of(entry.get("value"))


def joined(given: Any, separator: str) -> str:
    items = given if isinstance(given, list) else [given]
    return separator.join(text_of(item) for item in items)


def text_of(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(a_part_of(SCHEMA).map(without_expressions))
def test_what_is_accepted_renders(values: Values) -> None:
    check(values)


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("CHART_EXAMPLES", "200")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(a_part_of(SCHEMA).map(without_expressions))
def test_what_is_accepted_renders_in_many_cases(values: Values) -> None:
    check(values)
