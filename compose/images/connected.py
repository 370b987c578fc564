"""Answers whether this container holds a TCP connection to a given remote port.

The health check of a service that serves no port of its own: `python -m compose.images.connected
19092` exits 0 while a connection to port 19092 of any host is established, 1 otherwise. It reads
the kernel's tables, so it costs the broker nothing and needs no client.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

# One line a socket; a container has its own network namespace, so these are its own sockets.
SOCKET_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
# The kernel's TCP_ESTABLISHED, as the tables print it.
ESTABLISHED = "01"
REMOTE_ADDRESS_COLUMN = 2
STATE_COLUMN = 3
PORT_MAX = 65_535


def established_ports(lines: Iterable[str]) -> set[int]:
    """Remote ports of the established sockets in one table.

    Args:
        lines: the table as the kernel prints it, its heading first.

    >>> established_ports(["  sl  local remote st", "0: 0100007F:1F90 0100007F:4A94 01 0:0"])
    {19092}
    """
    rows = [line.split() for line in list(lines)[1:]]
    return {
        int(row[REMOTE_ADDRESS_COLUMN].rsplit(":", 1)[1], 16)
        for row in rows
        if row[STATE_COLUMN] == ESTABLISHED
    }


def connected(port: int) -> bool:
    """True while some socket here is connected to `port` of another end."""
    tables = (table.read_text(encoding="ascii") for table in SOCKET_TABLES if table.exists())
    return any(port in established_ports(table.splitlines()) for table in tables)


def main(arguments: list[str]) -> int:
    """Exit status for Docker: 0 connected, 1 not; 2 for an argument that is no port."""
    if len(arguments) != 1 or not arguments[0].isdecimal() or int(arguments[0]) > PORT_MAX:
        sys.stderr.write(
            f"{arguments} is not one port from 0 to {PORT_MAX}; "
            "try: python -m compose.images.connected 19092\n",
        )
        return 2
    port = int(arguments[0])
    if connected(port):
        return 0
    sys.stderr.write(f"no established connection to port {port}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
