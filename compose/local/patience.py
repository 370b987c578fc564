"""Run by path, with no package: a broker behind a door that lets fetches wait.

    python -I -S patience.py PORT BROKER_PORT ARGV...

Starts the broker ARGV, which listens on BROKER_PORT, and takes its clients' connections on PORT.
The embedded broker answers a fetch at once, whether there is anything or not and whatever time it
was given: an idle consumer asks it ten thousand times a second, and both spin. Here a fetch waits
until `PACE_S` have gone by since the one before on its connection, unless much came meanwhile; then
events are at most so much later, and nobody spins. Where the broker names its own address, PORT is
put in, so that clients stay with the door. SIGTERM is passed on, and the broker ends with its door.

Source: the Kafka protocol guide, "Protocol Primitive Types" and "Request and Response Headers".
"""

import asyncio
import ctypes
import signal
import struct
import sys

HOST = "127.0.0.1"
PACE_S = 0.004
# An answer of so many bytes says that there is more: the next fetch does not wait.
MUCH = 32_768
FETCH, METADATA, FIND_COORDINATOR, DESCRIBE_CLUSTER = 1, 3, 10, 60
NAMES_ADDRESSES = frozenset({METADATA, FIND_COORDINATOR, DESCRIBE_CLUSTER})
# Length; then, of a request, its kind, version and number, and of an answer the number it answers.
LENGTH, REQUEST, ANSWER = struct.Struct(">i"), struct.Struct(">hhi"), struct.Struct(">i")
PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Door:
    """One client's connection and the one to the broker that stands for it."""

    def __init__(self, ports: tuple[int, int]) -> None:
        self._own, self._broker = (HOST.encode() + LENGTH.pack(port) for port in ports)
        self._to_readdress: set[int] = set()
        self._next_fetch_s = 0.0

    async def requests(self, client: asyncio.StreamReader, broker: asyncio.StreamWriter) -> None:
        """Pass on what the client asks, each fetch in its time."""
        clock = asyncio.get_running_loop().time
        while True:
            frame = await _frame(client)
            kind, _, number = REQUEST.unpack_from(frame, LENGTH.size)
            if kind == FETCH:
                await asyncio.sleep(self._next_fetch_s - clock())
                self._next_fetch_s = clock() + PACE_S
            elif kind in NAMES_ADDRESSES:
                self._to_readdress.add(number)
            broker.write(frame)
            await broker.drain()

    async def answers(self, broker: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        """Pass on what the broker answers, its address replaced."""
        while True:
            frame = await _frame(broker)
            (number,) = ANSWER.unpack_from(frame, LENGTH.size)
            if len(frame) >= MUCH:
                self._next_fetch_s = 0.0
            if number in self._to_readdress:
                self._to_readdress.remove(number)
                frame = frame.replace(self._broker, self._own)
            client.write(frame)
            await client.drain()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(LENGTH.size)
    return head + await reader.readexactly(*LENGTH.unpack(head))


async def serve(own_port: int, broker_port: int, argv: list[str]) -> int:
    """Return how the broker ended."""
    broker = await asyncio.create_subprocess_exec(*argv, preexec_fn=_die_with_parent)
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, broker.send_signal, number)

    async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection(HOST, broker_port)
        except ConnectionRefusedError:  # not up yet, or ending: the client sees it as refused
            writer.close()
            return
        door = Door((own_port, broker_port))
        ways = (door.requests(reader, inner_writer), door.answers(inner_reader, writer))
        try:
            await _first_of(*ways)
        finally:
            writer.close()
            inner_writer.close()

    async with await asyncio.start_server(admit, HOST, own_port):
        return await broker.wait()


async def _first_of(*ways: "asyncio._CoroutineLike[None]") -> None:
    """Return when either side has closed its connection."""
    tasks = [asyncio.create_task(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    closed = (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError)
    for one in ended:
        if isinstance(one, BaseException) and not isinstance(one, closed):
            raise one


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Run until the broker ends."""
    own_port, broker_port, *argv = sys.argv[1:]
    code = asyncio.run(serve(int(own_port), int(broker_port), argv))
    # As a shell has it, for one that a signal ended.
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
