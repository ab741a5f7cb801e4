"""The other side of the socket, in a process of its own so that its work is not counted as the server's.

`Requests` is what the benchmark tells it; the module, run as a program, reads them from its standard input, sends each
over kept-alive connections with one request in flight on each, and says when the last answer has arrived.
"""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

CONNECTIONS = 8


class Requests(msgspec.Struct, frozen=True):
    """The same request `count` times; `head` is everything up to the blank line."""

    port: int
    head: str
    body: str
    count: int
    status: int


class Client:
    """The process, seen from the benchmark."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def send(self, requests: Requests) -> None:
        """Have the requests sent, and return when all are answered. Raises: RuntimeError for an unexpected status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(requests) + b"\n")
        said = (await self._process.stdout.readline()).decode().strip()
        if said != "done":
            raise RuntimeError(f"{requests.head.partition(' HTTP')[0]}: {said or 'the client ended'}")


@asynccontextmanager
async def open_client() -> AsyncIterator[Client]:
    """Run the client process for the length of the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield Client(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


def _exchange(connections: list[socket.socket], requests: Requests) -> str:
    """Send all, taking the connections in turn, and return "done" or what was wrong."""
    content = requests.body.encode()
    sent = f"{requests.head}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    expected = f"HTTP/1.1 {requests.status} ".encode()
    for connection in connections[: requests.count]:
        connection.sendall(sent)
    for number in range(requests.count):
        connection = connections[number % len(connections)]
        answer = _answer(connection)
        if not answer.startswith(expected):
            return answer.decode("latin-1").replace("\r\n", " | ")
        if number + len(connections) < requests.count:
            connection.sendall(sent)
    return "done"


def _answer(connection: socket.socket) -> bytes:
    answer = connection.recv(65536)
    while (end := answer.find(b"\r\n\r\n") + 4) < 4:
        answer += connection.recv(65536)
    length = int(answer[:end].lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    pieces, missing = [answer], end + length - len(answer)
    while missing > 0:
        pieces.append(connection.recv(min(missing, 65536)))
        missing -= len(pieces[-1])
    return b"".join(pieces)


def _main() -> None:
    ports: dict[int, list[socket.socket]] = {}
    for line in sys.stdin:
        requests = msgspec.json.decode(line, type=Requests)
        if requests.port not in ports:
            ports[requests.port] = [socket.create_connection(("127.0.0.1", requests.port)) for _ in range(CONNECTIONS)]
        print(_exchange(ports[requests.port], requests), flush=True)


if __name__ == "__main__":
    _main()
