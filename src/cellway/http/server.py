"""The HTTP server around the application: uvicorn, with the limits that only the connection can keep.

Called by the command line. It knows nothing of what is served.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cellway.config import Limits
from cellway.errors import Conflict, Invalid
from cellway.http.app import Asgi


def bind(host: str, port: int) -> socket.socket:
    """Take the address, before anything else is begun. Port 0 takes any that is free.

    Raises: Conflict when another program has it; Invalid for an address that is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        if isinstance(error, socket.gaierror) or error.errno is None or error.strerror is None:
            raise Invalid("up.bad_address", f"{host} is not an address to listen on") from error
        if error.errno == 98:
            message = f"port {port} on {host} is taken by another program"
            raise Conflict("up.port_taken", message, port=port) from error
        raise Invalid("up.bad_address", f"cannot listen on {host} port {port}: {error.strerror}") from error
    return taken


class Server(uvicorn.Server):
    """Serves until `stop`. Signals are left to the process."""

    def __init__(self, app: Asgi, limits: Limits) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_bounded(limits),
                loop="none",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=max(1, int(limits.rpc_timeout_seconds)),
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: the process stops what it runs in its own order."""
        yield

    def stop(self) -> None:
        """Take no more requests and end when those in hand are answered."""
        self.should_exit = True


@asynccontextmanager
async def serving(app: Asgi, taken: socket.socket, limits: Limits) -> AsyncIterator["asyncio.Task[None]"]:
    """Serve on a bound socket for the length of the block; then requests in hand are answered first.

    The task ends when the server does.
    """
    server = Server(app, limits)
    task = asyncio.create_task(server.serve(sockets=[taken]))
    try:
        while not server.started and not task.done():  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.005)
        yield task
    finally:
        server.stop()
        await task


def _bounded(limits: Limits) -> type[asyncio.Protocol]:
    """Return the connection protocol that closes a connection whose request does not arrive in time."""

    class Bounded(HttpToolsProtocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._expect()

        def on_headers_complete(self) -> None:
            self._arrived()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._arrived()
            super().connection_lost(exc)

        def _expect(self) -> None:
            self._arrived()
            self._late = self.loop.call_later(limits.receive_seconds, self.transport.close)

        def _arrived(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Bounded
