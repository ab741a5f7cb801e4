"""RabbitMQ: the transport of `rabbit://USER:PASSWORD@HOST:PORT,…/VHOST?ssl=1` (seed 001, decision 0015).

`Transports` makes it; this is the only file that knows the broker's library. It must not look into a message, and no
log line, error or repr of it shows a URL, a host or a password: an error of the library is never passed on.

A consumer of ADDRESS has two queues. `ADDRESS.owner` is exclusive to its connection: whoever declared it is the only
consumer, and it carries the calls, which die with it as nobody would wait for them. ADDRESS is durable and replicated
and carries the casts, which wait while no consumer is there. Consumers have connections of their own, because a broker
with an alarm stops reading from those that publish.
"""

import asyncio
import itertools
import logging
import math
import random
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final
from urllib.parse import parse_qsl, unquote

import aio_pika
import structlog
from aio_pika import DeliveryMode, Message, exceptions
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue, TimeoutType

from cellway.config import Limits, Secret
from cellway.context import Clock, Consumer, Deliver
from cellway.errors import CellwayError, Conflict, DeadlineExceeded, Invalid, OutcomeUnknown, Unavailable
from cellway.rpc.transport import (
    check_size,
    closed,
    drain,
    not_begun,
    queue_full,
    second_consumer,
    unanswered,
    unroutable,
)

log = structlog.get_logger()

# Their lines name hosts, and at the debug level hold what crosses the wire. What matters of it is logged here.
for _library in ("aio_pika", "aiormq"):
    logging.getLogger(_library).setLevel(logging.CRITICAL + 1)

DEAD: Final = "cellway.dead"
"""The queue of a virtual host's casts that failed or were handed out too often."""
_REPLIES: Final = "amq.rabbitmq.reply-to"
_ADDRESS_BYTES: Final = 240
"""Longer ones, with what is added to them, do not fit into AMQP's names."""
_SILENT_HEARTBEATS: Final = 3
"""After so many a broker has certainly closed the connection of a consumer that died, and given its place free."""
_OPTIONS: Final = {"ssl", "ssl_ca_file", "ssl_cert_file", "ssl_key_file"}
_FAULTS = exceptions.CONNECTION_EXCEPTIONS


class _Reply(StrEnum):
    """What a reply is, as its AMQP type: an answer, or why there will be none."""

    ANSWER = "answer"
    NOT_BEGUN = "not begun"
    STOPPED = "stopped"
    FAILED = "failed"
    SILENT = "silent"


# ---- what a URL says -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class _Host:
    """One node of a broker, and who we are there."""

    name: str
    port: int
    user: str
    password: Secret


@dataclass(frozen=True, slots=True, repr=False)
class _Broker:
    """A virtual host, and the nodes that serve it."""

    hosts: tuple[_Host, ...]
    vhost: str
    tls: bool
    options: dict[str, str]

    def ssl_context(self) -> ssl.SSLContext:
        """Read the files that say whom to trust and who we are. Raises: OSError for any that cannot be used."""
        context = ssl.create_default_context(cafile=self.options.get("ssl_ca_file"))
        if certificate := self.options.get("ssl_cert_file"):
            context.load_cert_chain(certificate, self.options.get("ssl_key_file"))
        return context


def _parse(url: str) -> _Broker:
    """Take a URL apart. Not by urlsplit, whose errors quote it. Raises: Invalid, which quotes nothing."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    netloc, _, path = rest.partition("/")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if not options.keys() <= _OPTIONS:
        raise _bad_url(f"has an option that is not known here; known are {', '.join(sorted(_OPTIONS))}")
    tls = scheme == "amqps" or options.get("ssl", "0").lower() in ("1", "true", "yes", "on")
    hosts: list[_Host] = []
    user, password = "guest", "guest"
    for part in netloc.split(","):
        credentials, at, where = part.rpartition("@")
        if at:
            user, password = (unquote(word) for word in credentials.partition(":")[::2])
        name, colon, port = where.rpartition(":")
        if not colon or port.endswith("]"):
            name, port = where, "5671" if tls else "5672"
        name = name.removeprefix("[").removesuffix("]")
        if not name or not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise _bad_url("names a host or port that cannot be; a comma or slash in a password is spelt %2C or %2F")
        hosts.append(_Host(name, int(port), user, Secret(password)))
    return _Broker(tuple(hosts), unquote(path) or "/", tls, options)


def _bad_url(what: str) -> Invalid:
    return Invalid("transport.bad_url", f"a transport URL of the rabbit scheme {what}")


# ---- errors ----------------------------------------------------------------------------------------------------


@contextmanager
def _faults_as(fault: CellwayError) -> Iterator[None]:
    """Raise `fault` for whatever the library raises about a connection."""
    try:
        yield
    except asyncio.CancelledError:
        if _is_cancelled():
            raise
        raise fault from None
    except _FAULTS:
        raise fault from None


def _is_cancelled() -> bool:
    """Is it this task that is cancelled? The library also cancels what it was asked to do when a connection ends."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _unreachable(why: str) -> Unavailable:
    return Unavailable("broker.unreachable", f"The message queue cannot be reached: {why}")


def _reason(error: BaseException) -> str:
    """Say why a host did not let us in, without the library's words, which may name it."""
    match error:
        case exceptions.AuthenticationError() | exceptions.ProbableAuthenticationError():
            return "it refuses the credentials"
        case TimeoutError():
            return "it does not answer"
        case exceptions.ConnectionClosed():
            return "it refuses the virtual host"
        case OSError(filename=str()):
            return "the files that ssl_ca_file and its like name cannot be read"
        case ssl.SSLError() | exceptions.AMQPConnectionError(__cause__=ssl.SSLError()):
            return "TLS failed"
        case exceptions.AMQPError():
            return "the connection was refused or lost"
        case _:
            return "the connection could not be made"


class _Pause:
    """When this process may try a broker again. Doubles with each failure, and differs between processes."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._failures = 0
        self._end = -math.inf

    def failed(self) -> None:
        limits = self._limits
        longest = min(limits.broker_retry_seconds * 2.0 ** min(self._failures, 60), limits.broker_retry_most_seconds)
        self._failures += 1
        self._end = self._clock.monotonic() + longest * random.uniform(0.5, 1.0)

    def worked(self) -> None:
        self._failures = 0

    @property
    def seconds(self) -> float:
        return max(0.0, self._end - self._clock.monotonic())


# ---- one connection --------------------------------------------------------------------------------------------


class _Connection(aio_pika.Connection):
    """One that is over when it could not be made: the library's own is ended by the collector, in whatever loop."""

    async def connect(self, timeout: TimeoutType = None) -> None:  # noqa: ASYNC109 - the library's parameter
        try:
            await super().connect(timeout)
        except BaseException:
            await self.close()
            raise


_Answer = bytes | Unavailable


@dataclass(slots=True, eq=False)
class _Link:
    """A connection with one channel, until either ends. `waiting` are the calls that were sent through it."""

    connection: AbstractConnection
    channel: AbstractChannel
    patience_seconds: float
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: dict[str, tuple[str, asyncio.Future[_Answer]]] = field(default_factory=dict)
    last_confirmed: float = -math.inf
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def watch(self) -> None:
        """Notice the end of the connection or the channel, from now on."""
        self.connection.close_callbacks.add(self.end)
        self.channel.close_callbacks.add(self.end)

    def end(self, *_: object) -> None:
        """Let nobody wait for it any more."""
        self.lost.set()
        for address, answer in self.waiting.values():
            if not answer.done():
                answer.set_result(unanswered(f"The connection was lost before {address} answered", address))

    async def take_reply(self, message: AbstractIncomingMessage) -> None:
        """Hand a reply to the call that waits for it, if it still does."""
        address, answer = self.waiting.get(message.correlation_id or "", ("", None))
        if answer is None or answer.done():
            return
        match message.type:
            case _Reply.ANSWER:
                answer.set_result(message.body)
            case _Reply.NOT_BEGUN:
                answer.set_result(not_begun(address))
            case _Reply.STOPPED:
                answer.set_result(unanswered(f"{address} stopped before it answered", address))
            case _Reply.SILENT:
                answer.set_result(unanswered(f"{address} gave no answer", address))
            case _:
                answer.set_result(unanswered(f"{address} failed", address))

    async def aclose(self) -> None:
        """Close the connection, without waiting long for the broker's consent."""
        self.end()
        await _close(self.connection, self.patience_seconds)


async def _close(connection: AbstractConnection, patience_seconds: float) -> None:
    try:
        async with asyncio.timeout(patience_seconds):
            await connection.close()
    except _FAULTS as error:
        log.warning("broker_close_failed", error=type(error).__name__)


# ---- the transport ---------------------------------------------------------------------------------------------


class RabbitTransport:
    """A connection to one virtual host, made when it is first used, and anew when it was lost.

    Raises: Invalid for a URL that cannot be understood.
    """

    def __init__(self, url: str, limits: Limits, clock: Clock) -> None:
        self._broker = _parse(url)
        self._limits = limits
        self._clock = clock
        self._pause = _Pause(limits, clock)
        self._first = 0
        self._link: _Link | None = None
        self._connecting: asyncio.Task[_Link] | None = None
        self._consumers: dict[str, RabbitConsumer] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._ended = False

    async def send(self, address: str, message: bytes, *, timeout_seconds: float) -> None:
        """See `Transport.send`. Raises also Invalid for a message that is too large; DeadlineExceeded and
        OutcomeUnknown when the broker did not confirm, so that it may have the message or not.
        """
        end = self._begin(address, message, timeout_seconds)
        link = await self._connected(end)
        await self._publish(link, Message(message, delivery_mode=DeliveryMode.PERSISTENT), address, address, end)

    async def request(self, address: str, message: bytes, *, timeout_seconds: float) -> bytes:
        """See `Transport.request`. Raises also Invalid for a message that is too large; OutcomeUnknown."""
        end = self._begin(address, message, timeout_seconds)
        link = await self._connected(end)
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        number = str(next(link.numbers))
        link.waiting[number] = (address, answer)
        try:
            call = Message(
                message,
                delivery_mode=DeliveryMode.NOT_PERSISTENT,
                correlation_id=number,
                reply_to=_REPLIES,
                # The broker drops it when nobody waits for the answer any more.
                expiration=max(0.001, end - _now()),
            )
            await self._publish(link, call, address, _owner(address), end)
            async with asyncio.timeout_at(end):
                result = await answer
        except TimeoutError:
            raise unanswered(f"{address} did not answer in time", address) from None
        finally:
            del link.waiting[number]
            if link is not self._link and not link.waiting:
                self._dispose(link.aclose())
        if isinstance(result, Unavailable):
            raise result
        return result

    async def consume(self, address: str, deliver: Deliver) -> Consumer:
        """See `Transport.consume`. Raises also Unavailable; Conflict for a queue that was declared otherwise.

        A consumer elsewhere may be dead and its connection linger: it is waited for as long as brokers let them.
        """
        if self._closed:
            raise closed()
        _check_address(address)
        if address in self._consumers:
            raise second_consumer(address)
        self._check_pause()
        consumer = self._consumers[address] = RabbitConsumer(self, address, deliver, self._limits, self._clock)
        try:
            await consumer.start()
        except BaseException:
            self.forget(address)
            raise
        return consumer

    async def aclose(self) -> None:
        """Close the connections, and the consumers made through them."""
        self._closed = True
        # They still answer the calls that they finish.
        await asyncio.gather(*(consumer.aclose() for consumer in list(self._consumers.values())))
        self._ended = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait((self._connecting,))
        if self._link is not None:
            self._dispose(self._link.aclose())
            self._link = None
        if self._closing:
            await asyncio.wait(self._closing)

    # ---- for its consumers

    def forget(self, address: str) -> None:
        """A consumer has ended."""
        self._consumers.pop(address, None)

    async def open(self) -> AbstractConnection:
        """Connect to the first host that lets us in, beginning with the one that did last.

        Raises: Unavailable.
        """
        why = ""
        for _ in self._broker.hosts:
            try:
                return await self._open(self._broker.hosts[self._first])
            except (*_FAULTS, ValueError, asyncio.CancelledError) as error:
                if _is_cancelled():
                    raise
                why = _reason(error)
                log.warning("broker_unreachable", host=self._first + 1, reason=why)
                self._try_next()
        self._pause.failed()
        raise _unreachable(why)

    async def rest(self) -> None:
        """Wait until an attempt may be made."""
        await self._clock.sleep(self._pause.seconds)

    def report(self, *, worked: bool) -> None:
        """Tell how an attempt ended."""
        if worked:
            self._pause.worked()
        else:
            self._pause.failed()

    async def reply(self, call: AbstractIncomingMessage, kind: _Reply, body: bytes = b"") -> None:
        """Answer a call. A caller that cannot be reached has its deadline."""
        end = _now() + self._limits.rpc_timeout_seconds
        message = Message(
            body, type=kind, correlation_id=call.correlation_id, delivery_mode=DeliveryMode.NOT_PERSISTENT
        )
        address = call.reply_to or ""
        try:
            link = await self._connected(end)
            # Not mandatory: RabbitMQ returns such replies although it delivers them.
            await self._publish(link, message, "the caller", address, end, mandatory=False)
        except Unavailable as error:
            log.warning("reply_lost", code=error.code)

    # ---- inside

    def _begin(self, address: str, message: bytes, timeout_seconds: float) -> float:
        if self._closed:
            raise closed()
        check_size(message, self._limits)
        _check_address(address)
        return _now() + timeout_seconds

    async def _connected(self, end: float) -> _Link:
        """Return the link for publishing; who needs a new one waits for the same attempt as all others."""
        if self._link is not None and not self._link.lost.is_set():
            return self._link
        if self._ended:
            raise closed()
        if self._connecting is None:
            self._check_pause()
            self._connecting = asyncio.ensure_future(self._connect())
            self._connecting.add_done_callback(self._was_connected)
        try:
            async with asyncio.timeout_at(end):
                return await asyncio.shield(self._connecting)
        except TimeoutError:
            raise _unreachable("no connection was made in time") from None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise closed() from None

    def _check_pause(self) -> None:
        if self._pause.seconds > 0:
            raise _unreachable("it could not just now, and is tried again in a moment")

    async def _connect(self) -> _Link:
        connection = await self.open()
        patience = self._limits.broker_connect_seconds
        try:
            with _faults_as(_unreachable("the connection was lost")):
                async with asyncio.timeout(patience):
                    channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                    link = _Link(connection, channel, patience)
                    link.watch()
                    replies = await channel.get_queue(_REPLIES, ensure=False)
                    await replies.consume(link.take_reply, no_ack=True)
        except BaseException:
            self._pause.failed()
            self._dispose(_close(connection, patience))
            raise
        lost, self._link = self._link, link
        if lost is not None:
            self._dispose(lost.aclose())
        return link

    def _was_connected(self, task: asyncio.Task[_Link]) -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # Every waiter has been told; there may be none left.

    async def _open(self, host: _Host) -> AbstractConnection:
        async with asyncio.timeout(self._limits.broker_connect_seconds):
            return await aio_pika.connect(
                host=host.name,
                port=host.port,
                login=host.user,
                password=host.password.reveal(),
                virtualhost=self._broker.vhost,
                ssl=self._broker.tls,
                ssl_context=await asyncio.to_thread(self._broker.ssl_context) if self._broker.tls else None,
                heartbeat=self._limits.broker_heartbeat_seconds,
                connection_class=_Connection,
            )

    async def _publish(
        self, link: _Link, message: Message, address: str, queue: str, end: float, *, mandatory: bool = True
    ) -> None:
        """Hand a message over; return once the broker has confirmed that it has it."""
        began = _now()
        lost = f"The connection was lost before the queue confirmed a message for {address}"
        try:
            async with asyncio.timeout_at(end):
                with _faults_as(OutcomeUnknown("message.unconfirmed", f"{lost}; it may have it", address=address)):
                    try:
                        await link.channel.default_exchange.publish(message, queue, mandatory=mandatory)
                    except exceptions.PublishError:
                        raise unroutable(address) from None
                    except exceptions.DeliveryError:
                        raise queue_full(address) from None
        except TimeoutError:
            if link.last_confirmed < began:
                self._retire(link)
            raise DeadlineExceeded(
                "message.unconfirmed",
                f"The queue did not confirm a message for {address} in time; it may have it",
                address=address,
            ) from None
        link.last_confirmed = _now()
        self._pause.worked()

    def _retire(self, link: _Link) -> None:
        """Send nothing more through a link that is silent: its broker has an alarm, or is gone without a word."""
        if link is not self._link:
            return
        log.warning("broker_silent")
        self._link = None
        self._pause.failed()
        self._try_next()
        if not link.waiting:
            self._dispose(link.aclose())

    def _try_next(self) -> None:
        self._first = (self._first + 1) % len(self._broker.hosts)

    def _dispose(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _owner(address: str) -> str:
    return f"{address}.owner"


def _is_call(message: AbstractIncomingMessage) -> bool:
    # An answer goes to whoever waits for it, and into no queue that a message may name.
    return (message.reply_to or "").startswith(_REPLIES)


def _check_address(address: str) -> None:
    if len(address.encode()) > _ADDRESS_BYTES:
        raise Invalid("transport.bad_address", f"An address may hold {_ADDRESS_BYTES} bytes", maximum=_ADDRESS_BYTES)


def _now() -> float:
    return asyncio.get_running_loop().time()


# ---- the consumer ----------------------------------------------------------------------------------------------


class RabbitConsumer:
    """The consumer of one address, on a connection of its own that is made anew, for ever, when it is lost."""

    def __init__(
        self, transport: RabbitTransport, address: str, deliver: Deliver, limits: Limits, clock: Clock
    ) -> None:
        self._transport = transport
        self._address = address
        self._deliver = deliver
        self._limits = limits
        self._clock = clock
        self._context = copy_context()
        self._link: _Link | None = None
        self._stop_taking: Callable[[], Awaitable[Any]] | None = None
        self._working: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Become the consumer. Raises: Conflict, Unavailable."""
        self._link = await self._establish()
        if self._closing is not None:
            await self._link.aclose()
            raise closed()
        self._keeper = asyncio.ensure_future(self._keep(self._link))

    async def aclose(self) -> None:
        """Stop taking; finish what was taken, for `Limits.rpc_timeout_seconds` at most: no caller waits longer.

        Calls that were not begun are refused; casts that were not finished wait for the next consumer.
        """
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    # ---- its connection

    async def _keep(self, link: _Link) -> None:
        while True:
            await link.lost.wait()
            log.warning("consumer_lost", address=self._address)
            await link.aclose()
            while link.lost.is_set():
                await self._transport.rest()
                try:
                    link = self._link = await self._establish()
                except Exception as error:
                    why = error.code if isinstance(error, CellwayError) else type(error).__name__
                    log.warning("consumer_still_lost", address=self._address, error=why)
            log.info("consumer_restored", address=self._address)

    async def _establish(self) -> _Link:
        connection = await self._transport.open()
        patience = self._limits.broker_connect_seconds
        try:
            with _faults_as(_unreachable("the connection was lost, or the queues were refused")):
                channel, owner = await self._own(connection)
                link = _Link(connection, channel, patience)
                link.watch()
                async with asyncio.timeout(patience):
                    await self._take(link, owner)
        except BaseException:
            self._transport.report(worked=False)
            await _close(connection, patience)
            raise
        self._transport.report(worked=True)
        return link

    async def _own(self, connection: AbstractConnection) -> tuple[AbstractChannel, AbstractQueue]:
        """Declare the queue that only one connection can have."""
        end = self._clock.monotonic() + _SILENT_HEARTBEATS * self._limits.broker_heartbeat_seconds
        while True:
            async with asyncio.timeout(self._limits.broker_connect_seconds):
                channel = await connection.channel()
                try:
                    return channel, await channel.declare_queue(_owner(self._address), exclusive=True)
                except exceptions.ChannelClosed as error:
                    if not str(error).startswith("RESOURCE_LOCKED"):
                        raise
            if self._clock.monotonic() >= end:
                raise second_consumer(self._address) from None
            await self._clock.sleep(min(0.25, self._limits.broker_heartbeat_seconds))

    async def _take(self, link: _Link, owner: AbstractQueue) -> None:
        """Declare the queues of casts, and begin to take from both."""
        limits = self._limits
        await link.channel.set_qos(prefetch_count=limits.consumer_concurrency)
        try:
            await link.channel.declare_queue(
                DEAD, durable=True, arguments={"x-queue-type": "quorum", "x-max-length": limits.dead_messages}
            )
            casts = await link.channel.declare_queue(
                self._address,
                durable=True,
                # All explicit: the defaults differ between RabbitMQ 3.10 and 4.
                arguments={
                    "x-queue-type": "quorum",
                    "x-delivery-limit": limits.queue_deliveries,
                    "x-dead-letter-exchange": "",
                    "x-dead-letter-routing-key": DEAD,
                    "x-max-length": limits.queue_messages,
                    "x-overflow": "reject-publish",
                },
            )
        except exceptions.ChannelPreconditionFailed:
            raise Conflict(
                "queue.declared_otherwise",
                f"The queue {self._address} or {DEAD} exists with other limits than are set here; remove it first",
                address=self._address,
            ) from None
        call_tag, cast_tag = await owner.consume(self._begin), await casts.consume(self._begin)
        # The broker tells when it takes a queue away; the channel stays open then.
        (await link.channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(link.end)

        async def stop() -> None:
            await casts.cancel(cast_tag)
            await owner.cancel(call_tag)
            await link.channel.set_qos(prefetch_count=0)
            await owner.consume(self._refuse, no_ack=True)

        self._stop_taking = stop

    async def _close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait((self._keeper,))
        link = self._link
        if link is not None and self._stop_taking is not None and not link.lost.is_set():
            try:
                with _faults_as(_unreachable("the connection was lost")):
                    async with asyncio.timeout(self._limits.broker_connect_seconds):
                        await self._stop_taking()
            except Unavailable:
                # Nothing comes through it any more, or it ends below.
                log.warning("consumer_lost", address=self._address)
        await drain(self._working, self._limits)
        if link is not None:
            # What was not acknowledged goes back to the queue.
            await link.aclose()
        self._transport.forget(self._address)

    # ---- its work

    async def _begin(self, message: AbstractIncomingMessage) -> None:
        # A task of its own, which outlives the connection: what was begun is finished.
        task = self._context.run(asyncio.ensure_future, self._work(message))
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _refuse(self, call: AbstractIncomingMessage) -> None:
        await self._transport.reply(call, _Reply.NOT_BEGUN)

    async def _work(self, message: AbstractIncomingMessage) -> None:
        is_call = _is_call(message)
        try:
            answer = await self._deliver(message.body)
        except asyncio.CancelledError:
            if self._closing is None:
                await self._drop(message, "CancelledError")
            elif is_call:
                await self._transport.reply(message, _Reply.STOPPED)
        except Exception as error:
            await self._drop(message, type(error).__name__)
        else:
            if is_call and answer is None:
                await self._transport.reply(message, _Reply.SILENT)
            elif is_call:
                await self._transport.reply(message, _Reply.ANSWER, answer or b"")
            await self._settle(message.ack)

    async def _drop(self, message: AbstractIncomingMessage, error: str) -> None:
        log.error("message_dropped", address=self._address, error=error)
        if _is_call(message):
            await self._transport.reply(message, _Reply.FAILED)
        # Among the dead ones, if it is a cast.
        await self._settle(message.reject)

    async def _settle(self, settle: Callable[[], Awaitable[None]]) -> None:
        try:
            with _faults_as(_unreachable("the connection was lost")):
                await settle()
        except Unavailable:
            # The broker hands a cast out again: that it is carried out once is its method's promise.
            log.warning("acknowledgement_lost", address=self._address)
