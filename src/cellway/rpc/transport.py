"""Transports: what carries bytes to an address of one message queue, and the registry that owns them (seed 001).

`Transports` is made and closed by `Application`; `target_cell`, agents and conductors lease from it the transport of a
URL. `memory://NAME` is a queue inside this process, `rabbit://` is RabbitMQ (`amqp.py`), `none:///` is cell0's: it
refuses, and never falls back to another queue. Nothing here looks into a message, and no log line, error or repr of it
shows a URL.

Calls and casts. A call (`request`) lives as long as its caller waits: one whose caller has given up is dropped unread,
so no deadline travels inside messages and no two clocks are compared. A cast (`send`) has no such end: it waits for a
consumer's turn, and for the next consumer when this one leaves. RabbitMQ keeps casts also while there is no consumer,
once there has been one; a queue of this process has nowhere to keep them and refuses.
"""

import asyncio
import hashlib
import pkgutil
from collections import deque
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar, cast

import structlog

from cellway.config import Limits, Secret
from cellway.context import Clock, Consumer, Deliver, Transport
from cellway.errors import CellHasNoQueue, Conflict, DeadlineExceeded, HostUnreachable, Invalid, Unavailable

T = TypeVar("T")

log = structlog.get_logger()


class OwnedTransport(Transport, Protocol):
    """A transport as its owner, the registry, sees it. Made without I/O: the first use connects."""

    async def aclose(self) -> None:
        """Close the connection, and the consumers made through it."""
        ...


# ---- the registry ----------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Open:
    """A transport that is open, and how many hold it."""

    digest: str
    transport: OwnedTransport
    used: float
    leases: int = 0


class Transports:
    """The transports of a process, one per URL. Used from one event loop: opening is single-flight by itself."""

    def __init__(self, brokers: "MemoryBrokers", limits: Limits, clock: Clock) -> None:
        self._brokers = brokers
        self._limits = limits
        self._clock = clock
        self._open: dict[str, _Open] = {}
        self._leased: dict[Transport, _Open] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def lease(self, url: Secret) -> Transport:
        """Return the transport of `url`, held open until `release`. No I/O happens here.

        Raises: Invalid for a URL of an unknown scheme; Unavailable when the limit of open transports is reached and
        all are in use, or after `aclose`.
        """
        if self._closed:
            raise closed()
        digest = hashlib.sha256(url.reveal().encode()).hexdigest()
        entry = self._open.get(digest)
        if entry is None:
            transport = self._make(url.reveal())
            self._make_room()
            entry = self._open[digest] = _Open(digest, transport, self._clock.monotonic())
        entry.leases += 1
        self._leased[entry.transport] = entry
        return entry.transport

    def release(self, transport: Transport) -> None:
        """Give a lease back; the transport stays open for the next one until it has been idle for long."""
        entry = self._leased[transport]
        entry.leases -= 1
        entry.used = self._clock.monotonic()
        if entry.leases == 0:
            del self._leased[transport]

    def expire_idle(self) -> None:
        """Close what nobody has held for `Limits.idle_seconds`; the owner calls this now and then."""
        oldest = self._clock.monotonic() - self._limits.idle_seconds
        for entry in list(self._open.values()):
            if entry.leases == 0 and entry.used <= oldest:
                self._close(entry)

    async def aclose(self) -> None:
        """Close every transport, and wait until they are closed."""
        self._closed = True
        for entry in list(self._open.values()):
            self._close(entry)
        if self._closing:
            await asyncio.wait(self._closing)

    def _make(self, url: str) -> OwnedTransport:
        # Not urlsplit: the errors it raises quote the URL.
        scheme, separator, rest = url.partition("://")
        match scheme if separator else "":
            case "memory":
                return MemoryTransport(self._brokers, rest.strip("/"), self._limits)
            case "none":
                return NullTransport()
            case "rabbit" | "amqp" | "amqps":
                # By its name: a process that speaks to no broker, as most commands are, does not load the library.
                make = pkgutil.resolve_name("cellway.rpc.amqp:RabbitTransport")
                return cast(OwnedTransport, make(url, self._limits, self._clock))
            case _:
                raise Invalid("transport.unknown_scheme", "the transport URL begins with no scheme that is known here")

    def _make_room(self) -> None:
        if len(self._open) < self._limits.open_transports:
            return
        unused = [entry for entry in self._open.values() if entry.leases == 0]
        if not unused:
            raise Unavailable("transport.too_many_open", "Too many message queues are in use at once")
        self._close(min(unused, key=lambda entry: entry.used))

    def _close(self, entry: _Open) -> None:
        del self._open[entry.digest]
        task = asyncio.ensure_future(entry.transport.aclose())
        self._closing.add(task)
        task.add_done_callback(self._was_closed)

    def _was_closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            log.info("transport_closed")
        else:
            log.error("transport_close_failed", exc_info=error)


# ---- what every transport says alike ---------------------------------------------------------------------------


def closed() -> Unavailable:
    """Return the error of a transport that is used after its end."""
    return Unavailable("transport.closed", "The connection to the message queue is closed")


def check_size(message: bytes, limits: Limits) -> None:
    """Refuse a message that is too large. Raises: Invalid."""
    if len(message) > limits.message_bytes:
        raise Invalid(
            "message.too_large",
            f"A message may hold {limits.message_bytes} bytes",
            bytes=len(message),
            maximum=limits.message_bytes,
        )


def second_consumer(address: str) -> Conflict:
    """Return the refusal of a second consumer, which is also logged: a host runs two agents."""
    log.error("consumer_refused", address=address)
    return Conflict("consumer.exists", f"{address} already has a consumer; there can be only one", address=address)


def unroutable(address: str) -> HostUnreachable:
    """Return the error of a message for an address without a consumer."""
    return HostUnreachable("message.unroutable", f"Nobody consumes {address}", address=address)


def queue_full(address: str) -> Unavailable:
    """Return the error of a message for an address where too many wait."""
    return Unavailable("message.queue_full", f"Too many messages wait for {address}", address=address)


def unanswered(what: str, address: str) -> DeadlineExceeded:
    """Return the error of a call that gets no answer any more, though it may have been carried out."""
    return DeadlineExceeded("message.unanswered", f"{what}; whether it did the work is unknown", address=address)


def not_begun(address: str) -> Unavailable:
    """Return the error of a call that its consumer did not begin, and never will."""
    return Unavailable("consumer.stopped", f"{address} stopped before it began the work", address=address)


async def drain(working: "set[asyncio.Task[T]]", limits: Limits) -> None:
    """Let what was taken finish for `Limits.rpc_timeout_seconds`, then cancel it; leave behind what will not end."""
    for _ in range(2):
        if working:
            # The second time is for a handler's own cleaning up.
            await asyncio.wait(working, timeout=limits.rpc_timeout_seconds)
        for task in working:
            task.cancel()


# ---- none:/// --------------------------------------------------------------------------------------------------


class NullTransport:
    """The transport of a cell without a queue: whatever is tried, it refuses."""

    async def send(self, address: str, message: bytes, *, timeout_seconds: float) -> None:
        raise _no_queue(address)

    async def request(self, address: str, message: bytes, *, timeout_seconds: float) -> bytes:
        raise _no_queue(address)

    async def consume(self, address: str, deliver: Deliver) -> Consumer:
        raise _no_queue(address)

    async def aclose(self) -> None:
        """Do nothing: there is no connection."""


def _no_queue(address: str) -> CellHasNoQueue:
    return CellHasNoQueue(
        "cell.no_queue", f"{address} cannot be reached: this cell has no message queue", address=address
    )


# ---- memory:// -------------------------------------------------------------------------------------------------

_Answer = bytes | Unavailable


@dataclass(slots=True, eq=False)
class _Message:
    """A message on its way; `reply` is None for one that wants no answer, and done when its caller has given up."""

    body: bytes = field(repr=False)
    reply: asyncio.Future[_Answer] | None = None

    def settle(self, answer: _Answer) -> None:
        if self.reply is not None and not self.reply.done():
            self.reply.set_result(answer)


class _Queue:
    """One address of a broker: the messages that wait there, and the only consumer."""

    __slots__ = ("consumer", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[_Message] = deque()
        self.consumer: MemoryConsumer | None = None


class MemoryBrokers:
    """The queues of this process, by the NAME of `memory://NAME` and by address. Owned by `Application`."""

    def __init__(self) -> None:
        self._brokers: dict[str, dict[str, _Queue]] = {}

    def queues(self, name: str) -> dict[str, _Queue]:
        """Return the queues of one broker, made on first use."""
        return self._brokers.setdefault(name, {})


class MemoryTransport:
    """A connection to one broker of this process.

    Raises: Invalid for an empty name, which two cells would share by mistake.
    """

    def __init__(self, brokers: MemoryBrokers, name: str, limits: Limits) -> None:
        if not name:
            raise Invalid("transport.bad_url", "a transport URL of the memory scheme needs a name: memory://NAME")
        self._queues = brokers.queues(name)
        self._limits = limits
        self._consumers: list[MemoryConsumer] = []
        self._closed = False

    async def send(self, address: str, message: bytes, *, timeout_seconds: float) -> None:
        """See `Transport.send`. Raises also Invalid for a message that is too large."""
        if self._put(address, _Message(message)).waiting:
            # The consumer lags: let it work before this sender goes on to fill the queue.
            await asyncio.sleep(0)

    async def request(self, address: str, message: bytes, *, timeout_seconds: float) -> bytes:
        """See `Transport.request`. Raises also Invalid for a message that is too large."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[_Answer] = loop.create_future()
        waiting = _Message(message, reply)
        self._put(address, waiting)
        timer = loop.call_later(timeout_seconds, _expire, waiting, address)
        try:
            answer = await reply
        finally:
            timer.cancel()
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    async def consume(self, address: str, deliver: Deliver) -> Consumer:
        """See `Transport.consume`. When `deliver` raises, which it logs itself, its message is dropped."""
        if self._closed:
            raise closed()
        queue = self._queues.setdefault(address, _Queue())
        if queue.consumer is not None:
            raise second_consumer(address)
        consumer = queue.consumer = MemoryConsumer(address, queue, deliver, self._limits)
        self._consumers = [other for other in self._consumers if not other.closed] + [consumer]
        consumer.take()
        return consumer

    async def aclose(self) -> None:
        """Close the connection, and the consumers made through it."""
        self._closed = True
        await asyncio.gather(*(consumer.aclose() for consumer in self._consumers))

    def _put(self, address: str, message: _Message) -> _Queue:
        if self._closed:
            raise closed()
        check_size(message.body, self._limits)
        queue = self._queues.get(address)
        if queue is None or queue.consumer is None or queue.consumer.closed:
            raise unroutable(address)
        if len(queue.waiting) >= self._limits.queue_messages:
            raise queue_full(address)
        queue.waiting.append(message)
        queue.consumer.take()
        return queue


def _expire(message: _Message, address: str) -> None:
    message.settle(unanswered(f"{address} did not answer in time", address))


class MemoryConsumer:
    """The consumer of one address: a task for each message, `Limits.consumer_concurrency` at once."""

    def __init__(self, address: str, queue: _Queue, deliver: Deliver, limits: Limits) -> None:
        self.closed = False
        self._address = address
        self._queue = queue
        self._deliver = deliver
        self._limits = limits
        self._context = copy_context()
        self._working: set[asyncio.Task[bytes | None]] = set()

    def take(self) -> None:
        """Begin on messages that wait, as many as may be worked on."""
        while self._queue.waiting and not self.closed and len(self._working) < self._limits.consumer_concurrency:
            message = self._queue.waiting.popleft()
            if message.reply is None or not message.reply.done():
                # In the consumer's context: this may run in that of a sender, with the variables of its logs.
                task = self._context.run(asyncio.ensure_future, self._deliver(message.body))
                self._working.add(task)
                task.add_done_callback(partial(self._finish, message))

    async def aclose(self) -> None:
        """Stop taking; finish what was taken, for `Limits.rpc_timeout_seconds` at most: no caller waits longer.

        Calls that were not begun are refused at once; casts that were not finished wait for the next consumer.
        """
        if not self.closed:
            self.closed = True
            self._refuse_calls()
        try:
            await drain(self._working, self._limits)
        finally:
            for task in self._working:
                task.cancel()
            if self._queue.consumer is self:
                self._queue.consumer = None

    def _refuse_calls(self) -> None:
        waiting = self._queue.waiting
        self._queue.waiting = deque(message for message in waiting if message.reply is None)
        for message in waiting:
            message.settle(not_begun(self._address))

    def _finish(self, message: _Message, task: asyncio.Task[bytes | None]) -> None:
        self._working.discard(task)
        consumer = self._queue.consumer
        if task.cancelled():
            message.settle(unanswered(f"{self._address} stopped before it answered", self._address))
            if message.reply is None and self.closed:
                self._queue.waiting.appendleft(message)
            elif not self.closed:
                log.error("message_dropped", address=self._address, error="CancelledError")
        elif error := task.exception():
            message.settle(unanswered(f"{self._address} failed", self._address))
            log.error("message_dropped", address=self._address, error=type(error).__name__)
        else:
            answer = task.result()
            message.settle(unanswered(f"{self._address} gave no answer", self._address) if answer is None else answer)
        if consumer is not None:
            consumer.take()
