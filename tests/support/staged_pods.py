"""Pods on this machine: processes with a hostname, an address, files and an environment of their own.

Namespaces of the kernel make them, as they make containers: everything in a pod ends with its first process, and
nothing of it is left. A pod's image is this machine. Its user is root, without any of root's capabilities.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import psutil
import pytest

from support.paths import REPOSITORY

# So that a pod ends with this process, whatever ends that.
_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
_PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TOOLS = {"PATH": _PATH}
# This package, which may be installed from here, and Python with its packages, which may lie inside.
_IMAGE = (str(REPOSITORY), sys.prefix, sys.base_prefix)

_PROBE = """
ip link add here type veth peer name there && mount -t tmpfs none /mnt && cd /mnt && mkdir upper work root &&
mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work none root
"""
_SWITCH = """
ip link set lo up && ip link add pods type bridge && ip address add 10.88.0.1/16 dev pods &&
ip link set pods up && echo up && exec sleep infinity
"""
_POD = r"""
set -euo pipefail
switch=$1 address=$2 name=$3 folder=$4 hosts=$5 mounts=$6 image=$7 command=$8

nsenter "--net=/proc/$switch/ns/net" sh -ec "
  ip link add 'pod${address##*.}' type veth peer name eth0 netns $$
  ip link set 'pod${address##*.}' master pods up"
ip link set lo up
ip address add "$address/16" dev eth0
ip link set eth0 up
ip route add default via 10.88.0.1
hostname "$name"

mount -t tmpfs pod "$folder"
mkdir "$folder"/{upper,work,root}
mount -t overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" pod "$folder/root"
cd "$folder/root"
mount --rbind /dev dev
mount --rbind /sys sys
mount -t tmpfs shm dev/shm
mount -t tmpfs tmp tmp
rm -f etc/hosts etc/resolv.conf
echo "$hosts" >etc/hosts
touch etc/resolv.conf # empty: no name server, which would be waited for
while IFS=$'\t' read -r mode source path; do
  [[ $path ]] || continue
  mkdir -p ".$path"
  mount --rbind "$source" ".$path"
  mount -o "remount,bind,$mode" ".$path"
done <<<"$mounts"
while read -r path; do # of the image, where a mount hides it
  [[ -e .$path ]] || { mkdir -p ".$path" && mount --rbind "$path" ".$path"; }
done <<<"$image"

exec unshare --pid --fork --kill-child --mount-proc --root=. --wd=/ \
  setpriv --no-new-privs --bounding-set=-all --inh-caps=-all bash -c "$command"
"""


@cache
def skip_without_namespaces() -> None:
    """Skip the test where this process may not make namespaces, network devices and mounts."""
    words = ["sh", "-c", 'exec unshare --net --mount --pid --fork sh -c "$0"', _PROBE]
    done = subprocess.run(words, env=_TOOLS, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(
            f"pods can't be staged here; Linux, root, iproute2 and overlayfs are needed: {done.stderr}"
        )


@dataclass(frozen=True)
class Mount:
    """A folder of this machine that a pod sees at `path`."""

    source: Path
    path: str
    read_only: bool = False


class PodNetwork:
    """A network that only pods are on, and the names of its services."""

    def __init__(self) -> None:
        words = [*_WITH_PARENT, "unshare", "--net", "sh", "-c", _SWITCH]
        self._switch = subprocess.Popen(words, env=_TOOLS, stdout=subprocess.PIPE, text=True)
        assert self._switch.stdout is not None
        assert self._switch.stdout.readline() == "up\n"
        self._numbers = count(2)
        self._services: dict[str, str] = {}

    def start(
        self,
        name: str,
        folder: Path,
        command: str,
        environ: Mapping[str, str],
        mounts: Sequence[Mount],
        service: str | None = None,
    ) -> Pod:
        """Start a pod that runs `command` in bash, and that others find as `service`; `folder` holds its log."""
        address = f"10.88.0.{next(self._numbers)}"
        if service:
            self._services[service] = address
        hosts = {"localhost": "127.0.0.1", name: address, **self._services}
        root = folder / "root"
        root.mkdir(parents=True)
        arguments = [
            str(self._switch.pid),
            address,
            name,
            str(root),
            "\n".join(f"{hosts[host]} {host}" for host in hosts),
            "\n".join(
                f"{'ro' if mount.read_only else 'rw'}\t{mount.source}\t{mount.path}" for mount in mounts
            ),
            "\n".join(_IMAGE),
            command,
        ]
        namespaces = ["unshare", "--net", "--mount", "--uts", "--ipc"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*_WITH_PARENT, *namespaces, "bash", "-c", _POD, "pod", *arguments],
                env={"PATH": _PATH, **environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return Pod(name, address, folder / "log", process)

    def get(self, url: str) -> str | None:
        """Return what answers at `url`; None where nothing does, or an error."""
        words = ["nsenter", f"--net=/proc/{self._switch.pid}/ns/net", "curl", "-sf", "--max-time", "5", url]
        done = subprocess.run(words, env=_TOOLS, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else None

    def close(self) -> None:
        self._switch.kill()
        self._switch.communicate()


@dataclass(frozen=True)
class Pod:
    """A pod that was started."""

    name: str
    address: str
    log: Path
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End the pod at once, with all its processes, and wait for that."""
        if self.process.poll() is None:
            # The first process in the pod: it is gone when all others are.
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        self.process.wait(30)
