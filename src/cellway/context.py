"""Who asks, and which cell is meant: the contexts of seeds 000 and 001.

Every layer passes these on. They carry an opaque database key and a transport, never a URL: both stay out of
`repr` and out of `to_wire()`. Only `cells/target.py` makes a `CellContext`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import NamedTuple, Protocol, Self

import msgspec

from cellway.ids import CellUuid, ProjectId, RequestId, UserId


class CellRef(NamedTuple):
    """Which cell: enough to name it in a log or an error, and nothing secret."""

    uuid: CellUuid
    name: str


class Clock(Protocol):
    """Time, as an argument."""

    def now(self) -> datetime:
        """Return the wall clock as naive UTC, the form that the databases hold."""
        ...

    def monotonic(self) -> float:
        """Return seconds that never go back; only differences mean anything."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for `seconds`."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        return datetime.now(UTC).replace(tzinfo=None)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Consumer(Protocol):
    """One registered reader of an address."""

    async def aclose(self) -> None:
        """Stop reading; what was taken is finished first."""
        ...


Deliver = Callable[[bytes], Awaitable[bytes | None]]
"""What a consumer runs for each message: bytes in, reply bytes (or None for a cast) out."""


class Transport(Protocol):
    """A connection to one message queue, by address. Seed 001; implementations in `rpc/`."""

    async def send(self, address: str, message: bytes, *, timeout_seconds: float) -> None:
        """Hand over a message that wants no reply; return once the queue has accepted it.

        Raises: HostUnreachable when the queue has no place for it, since nobody consumes `address` (a broker keeps the
        place of a consumer that has left); CellHasNoQueue; Unavailable.
        """
        ...

    async def request(self, address: str, message: bytes, *, timeout_seconds: float) -> bytes:
        """Send a message and wait for the reply.

        Raises: DeadlineExceeded, HostUnreachable, CellHasNoQueue, Unavailable.
        """
        ...

    async def consume(self, address: str, deliver: Deliver) -> Consumer:
        """Become the only consumer of `address`.

        Raises: Conflict when another consumer holds it.
        """
        ...


class WireContext(msgspec.Struct, frozen=True, kw_only=True):
    """What of a context crosses a queue: who asks, and nothing about connections."""

    user_id: str
    project_id: str
    roles: tuple[str, ...]
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """Who asks. `db_connection` and `mq_connection` are the fields that seeds 000 and 001 name.

    `db_connection` is an opaque key into `Databases`; `mq_connection` is the cell's transport. Both are None
    until `target_cell` makes a `CellContext` from this one.
    """

    user_id: UserId
    project_id: ProjectId
    request_id: RequestId
    roles: frozenset[str] = frozenset()
    db_connection: str | None = field(default=None, repr=False)
    mq_connection: Transport | None = field(default=None, repr=False)

    def to_wire(self) -> WireContext:
        """Return the part that may leave this process."""
        return WireContext(
            user_id=self.user_id,
            project_id=self.project_id,
            roles=tuple(sorted(self.roles)),
            request_id=self.request_id,
        )

    @classmethod
    def from_wire(cls, wire: WireContext, mq_connection: Transport | None = None) -> "RequestContext":
        """Rebuild a context on the receiving side; the transport is the receiver's own."""
        return RequestContext(
            user_id=UserId(wire.user_id),
            project_id=ProjectId(wire.project_id),
            request_id=RequestId(wire.request_id),
            roles=frozenset(wire.roles),
            mq_connection=mq_connection,
        )

    def with_request_id(self, request_id: RequestId) -> Self:
        """Return the same context under another request id."""
        return replace(self, request_id=request_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class CellContext(RequestContext):
    """A context targeted at one cell: both connections set. Made by `target_cell` alone."""

    cell: CellRef
    db_connection: str = field(repr=False)
    mq_connection: Transport = field(repr=False)


def service_context(request_id: RequestId) -> RequestContext:
    """Return the context under which Cellway's own loops work: no user, no project, no role."""
    return RequestContext(user_id=UserId(""), project_id=ProjectId(""), request_id=request_id)
