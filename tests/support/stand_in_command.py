"""The commands `kubectl` and `helm` of a notebook's test: hand their words to a StagedNamespace, and its answer back."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
from multiprocessing.connection import Client


def main() -> None:
    words = sys.argv[1:]
    given = sys.stdin.read() if "--filename=-" in words else ""
    with Client(os.environ["STAGED_NAMESPACE"]) as connection:
        connection.send((words, given, os.getcwd()))
        answer, complaint = connection.recv()
    if complaint:
        sys.exit(f"error: {complaint}")
    if "port-forward" in words:
        forward(*answer)
    sys.stdout.buffer.write(answer if isinstance(answer, bytes) else answer.encode())


def forward(process: int, port: int) -> None:
    """Lead a free port of this machine to a port of the pod that the process is in, as long as this one runs."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"Forwarding from 127.0.0.1:{listener.getsockname()[1]} -> {port}", flush=True)
    # From here on, this thread's new sockets are in there; the listener stays here.
    with open(f"/proc/{process}/ns/net") as file:
        if ctypes.CDLL(None).setns(file.fileno(), 0) != 0:
            sys.exit("error: can't enter the pod's network")
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", port))
        for source, target in ((near, far), (far, near)):
            threading.Thread(target=copy, args=(source, target), daemon=True).start()


def copy(source: socket.socket, target: socket.socket) -> None:
    while content := source.recv(1 << 16):
        target.sendall(content)
    target.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main()
