"""Print the configuration of the Ray job with the variables that the scripts have exported.

Ray reads it in `ray.init`, and gives the variables to every worker. Takes what `env --null` prints now, and the
id of the shell that runs the scripts: what that was started with isn't theirs.
"""

import json
import os
import re
import sys
from pathlib import Path

CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
OF_THE_SHELL = {"_", "OLDPWD", "PWD", "SHLVL", CONFIG}
# Ray replaces these in a variable's value by what the worker's environment holds.
REFERENCE = re.compile(r"\$(\w|\{)")


def read_exported(shell: str) -> dict[str, str]:
    """Return the variables that the shell exports, and wasn't started with or with another value."""
    given = set(Path("/proc", shell, "environ").read_text(encoding="utf-8", errors="replace").split("\0"))
    now = sys.stdin.read().split("\0")
    exported = dict(entry.split("=", 1) for entry in now if entry and entry not in given)
    return {
        name: value
        for name, value in exported.items()
        if name not in OF_THE_SHELL and not name.startswith("BASH_FUNC_")
    }


def main() -> None:
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    config = json.loads(os.environ.get(CONFIG, "{}"))
    runtime_env = config.setdefault("runtime_env", {})
    variables = dict(runtime_env.get("env_vars") or {})
    for name, value in read_exported(sys.argv[1]).items():
        if REFERENCE.search(value):
            print(
                f"raytrain: {name} holds a `$`, which Ray would expand: the workers don't get it",
                file=sys.stderr,
            )
        else:
            variables[name] = value
    if variables:
        runtime_env["env_vars"] = variables
    print(json.dumps(config))


main()
