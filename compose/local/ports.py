"""Loopback ports: which are free, and which process really listens on one."""

from __future__ import annotations

import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"
_LISTEN = "0A"  # the kernel's code for TCP_LISTEN in /proc/net/tcp


def is_free(port: int) -> bool:
    """Whether a server could bind the port on loopback at this moment."""
    with socket.socket() as probe:
        # Without this, a connection in TIME_WAIT would look like an owner; servers set it too.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Distinct ports that nobody held a moment ago; another program may still be faster."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for held in sockets:
            held.bind((LOOPBACK, 0))
        return [int(held.getsockname()[1]) for held in sockets]
    finally:
        for held in sockets:
            held.close()


def listens(pid: int, port: int) -> bool:
    """Whether this very process owns a listening socket on the port.

    A probe that only connects would take a stranger's server for ours when both wanted the port.
    """
    inodes = _listening_inodes(port)
    if not inodes:
        return False
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(_inode(descriptor) in inodes for descriptor in descriptors)


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]
        except FileNotFoundError:  # a kernel without IPv6 has no tcp6
            continue
        for line in lines:
            _, local, _, state, *rest = line.split()
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{rest[5]}]")
    return inodes


def _inode(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except OSError:  # closed since the folder was listed
        return ""
