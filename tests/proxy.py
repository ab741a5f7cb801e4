"""A TCP proxy between us and a server, that breaks the way to it: the main tool of the tests of outages.

It runs in a thread and a loop of its own, so that synchronous and asynchronous tests may use it alike, and nothing that
the system under test does can stop it. Every mode counts for the connections that are open and for those to come.
"""

import asyncio
import contextlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

_CHUNK: Final = 65536


@dataclass(frozen=True, slots=True)
class Mode:
    """What is done to connections; the default passes everything on."""

    hang: bool = False
    """Accept and read, and never answer."""
    hold: bool = False
    """Read no further, and keep what was said for later; answers pass."""
    stall_after: int | None = None
    """So many bytes of answers pass, of all connections together; then they hang."""
    cut: re.Pattern[bytes] | None = None
    """When a client's bytes match, they are passed on, and the connection is cut once the server has answered."""
    cuts: int | None = None
    """How many cuts there are, at most."""
    silently: bool = False
    """A cut connection stays open, and the answer is kept back."""
    delay_seconds: float = 0.0
    """How long each piece takes in either direction."""
    bytes_per_second: float | None = None
    """How much of the answers passes in a second, on each connection."""


@dataclass(eq=False, slots=True)
class _Link:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    said: bytes = b""
    cut: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


_Way = Callable[[_Link, asyncio.StreamReader], Coroutine[Any, Any, None]]


class Proxy:
    """The way to one server; `opened` makes one. `cuts` counts answers that were cut, `accepted` connections."""

    def __init__(self, host: str, ports: Callable[[], Sequence[int]], tls: ssl.SSLContext | None) -> None:
        self.cuts = 0
        self.accepted = 0
        # Bound for good, so that nobody else gets the port while no connection is taken.
        self._address = socket.socket()
        self._address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._address.bind(("127.0.0.1", 0))
        self.port: int = self._address.getsockname()[1]
        self._host = host
        self._ports = ports
        self._tls = tls
        self._mode = Mode()
        self._flows = asyncio.Event()
        self._begun = 0  # cuts, with those whose answer is still to come
        self._passed = 0
        self._listener: socket.socket | None = None
        self._links: set[_Link] = set()
        self._accepting: dict[asyncio.Task[None], socket.socket] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._links)

    def heal(self) -> None:
        """Pass everything on, as at first, and what was held. Connections that hang are reset."""
        self._do(self._set(Mode(), drop=self._mode.hang or self._mode.stall_after is not None or self._mode.silently))

    def refuse(self) -> None:
        """Take no connection, and reset those that are open."""
        self._do(self._stop())

    def reset(self) -> None:
        """Reset the connections that are open (RST); new ones are taken."""
        self._do(self._set(self._mode, drop=True))

    def hang(self) -> None:
        """Take connections and what clients say, and never answer."""
        self._do(self._set(Mode(hang=True)))

    def hold(self) -> None:
        """Take what clients say only as far as buffers reach, and pass it on when healed; answers pass meanwhile."""
        self._do(self._set(Mode(hold=True)))

    def stall(self, after: int) -> None:
        """Pass on so many bytes of answers, and then hang."""
        self._do(self._set(Mode(stall_after=after)))

    def cut(self, pattern: bytes, *, times: int | None = None, silently: bool = False) -> None:
        """Lose the answer to whatever matches: the server has done it, and the client never hears of it."""
        self._do(self._set(Mode(cut=re.compile(pattern, re.DOTALL), cuts=times, silently=silently)))

    def slow(self, *, delay_seconds: float = 0.0, bytes_per_second: float | None = None) -> None:
        """Delay every piece, or let the answers through at a rate."""
        self._do(self._set(Mode(delay_seconds=delay_seconds, bytes_per_second=bytes_per_second)))

    # ---- in the thread of the proxy

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _set(self, mode: Mode, *, drop: bool = False) -> None:
        self._mode, self._passed, self._begun = mode, 0, 0
        if mode.hold:
            self._flows.clear()
        else:
            self._flows.set()
        for link in list(self._links):
            link.said = b""
            if drop:
                self._drop(link)
        if self._listener is None:
            # Not asyncio's own server: a connection that it takes while it is closed is lost in it, open.
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
            self._listener.setblocking(False)
            self._loop.add_reader(self._listener, self._take, self._listener)

    async def _stop(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            self._loop.remove_reader(listener)
            listener.close()
        for taken in self._accepting.values():
            # A client may be in the middle of its TLS handshake, and never go on.
            with contextlib.suppress(OSError):
                taken.shutdown(socket.SHUT_RDWR)
        for link in list(self._links):
            self._drop(link)

    def _take(self, listener: socket.socket) -> None:
        try:
            taken, _ = listener.accept()
        except OSError:
            # The client has gone away again.
            return
        self.accepted += 1
        task = self._loop.create_task(self._accept(taken))
        self._accepting[task] = taken
        task.add_done_callback(self._accepting.pop)

    async def _accept(self, taken: socket.socket) -> None:
        taken.setblocking(False)
        from_client = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(from_client)
        try:
            transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, taken, ssl=self._tls)
        except OSError:
            # No TLS was agreed upon.
            return
        client = asyncio.StreamWriter(transport, protocol, from_client, self._loop)
        try:
            from_server, server = await self._connect()
        except OSError:
            client.transport.abort()
            return
        if self._listener is None:
            client.transport.abort()
            server.transport.abort()
            return
        link = _Link(client, server)
        self._links.add(link)
        for side in (client, server):
            # What was drained is with the kernel, which delivers it also when we abort.
            side.transport.set_write_buffer_limits(0)
        for way, source in ((self._forward, from_client), (self._answer, from_server)):
            link.tasks.append(asyncio.create_task(self._until_it_breaks(way, link, source)))

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for port in self._ports():
            with contextlib.suppress(OSError):
                return await asyncio.open_connection(self._host, port)
        raise ConnectionRefusedError

    async def _until_it_breaks(self, way: _Way, link: _Link, source: asyncio.StreamReader) -> None:
        try:
            await way(link, source)
        except OSError:
            self._drop(link)
        else:
            self._drop(link, reset=False)

    async def _forward(self, link: _Link, from_client: asyncio.StreamReader) -> None:
        while piece := await from_client.read(_CHUNK):
            await self._flows.wait()
            mode = self._mode
            await asyncio.sleep(mode.delay_seconds)
            if mode.cut is not None and not link.cut and (mode.cuts is None or self._begun < mode.cuts):
                link.said = (link.said + piece)[-4 * _CHUNK :]
                if mode.cut.search(link.said):
                    self._begun += 1
                    link.cut = True
            if not mode.hang:
                link.server.write(piece)
                await link.server.drain()

    async def _answer(self, link: _Link, from_server: asyncio.StreamReader) -> None:
        while piece := await from_server.read(_CHUNK):
            mode = self._mode
            await asyncio.sleep(mode.delay_seconds)
            if link.cut:
                self.cuts += 1
                if not mode.silently:
                    raise ConnectionResetError
                piece = b""
            elif mode.hang:
                piece = b""
            elif mode.stall_after is not None:
                piece = piece[: max(0, mode.stall_after - self._passed)]
            self._passed += len(piece)
            if mode.bytes_per_second is not None:
                await asyncio.sleep(len(piece) / mode.bytes_per_second)
            link.client.write(piece)
            await link.client.drain()

    def _drop(self, link: _Link, *, reset: bool = True) -> None:
        """End both sides: the client's with RST, or as the server ends it."""
        if link not in self._links:
            return
        self._links.remove(link)
        for side in (link.client, link.server):
            raw = side.transport.get_extra_info("socket")
            if reset and side is link.client and raw is not None and raw.fileno() >= 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            side.transport.abort()
        for task in link.tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def _start(self) -> None:
        self._thread.start()
        self.heal()

    def _close(self) -> None:
        self._do(self._stop())
        self._do(self._end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()
        self._address.close()

    async def _end_tasks(self) -> None:
        await asyncio.gather(*self._accepting)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def opened(
    port: int | Callable[[], Sequence[int]], host: str = "127.0.0.1", *, tls: ssl.SSLContext | None = None
) -> Iterator[Proxy]:
    """Run a proxy before a server for the length of the block; with `tls` it is the end of an encrypted line.

    A function for a port gives, for each connection, the ports to try in this order.
    """
    proxy = Proxy(host, port if callable(port) else lambda: [port], tls)
    proxy._start()
    try:
        yield proxy
    finally:
        proxy._close()
