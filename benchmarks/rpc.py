"""RPC: a warm call and a cast until it is confirmed, next to aio-pika alone with messages of the same size.

`python -m benchmarks --rpc` calls `measure`. The consumers on RabbitMQ are this module run as a program, so that
each side's CPU can be told; over memory:// both sides are one process.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

import aio_pika
import msgspec
import uvloop
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage

from benchmarks.databases import NoServer
from cellway.config import Limits, Secret
from cellway.context import RequestContext, SystemClock, Transport, service_context
from cellway.ids import RequestId
from cellway.rpc.amqp import DEAD
from cellway.rpc.calls import BUILD_INSTANCE, HOST_REPORT, BuildInstance, CastMethod, Done, HostReport
from cellway.rpc.messaging import Handlers, call, cast, serve
from cellway.rpc.transport import MemoryBrokers, Transports

MESSAGES = 500
"""For each figure, one after the other."""
PORT = 5672
_URL = f"amqp://guest:guest@127.0.0.1:{PORT}/"
_REPLIES = "amq.rabbitmq.reply-to"
_DEADLINE_SECONDS = 60.0
_REPORT = HostReport(
    host="cell1-h1", epoch=3, sequence=1000, running=20, vcpus_used=40, memory_mb_used=81_920, disk_gb_used=400
)
_BUILD = BuildInstance(instance_uuid=str(uuid4()), attempt=1, name="measured", vcpus=2, memory_mb=4096, disk_gb=20)

_Parties = tuple[int | None, int | None, int | None]
"""The processes of caller, consumer and broker, as far as they are known and not the same."""
_Send = Callable[[], Awaitable[Any]]


class Way(msgspec.Struct):
    """What was measured of one way to send, in microseconds per message: a figure for each round."""

    name: str
    wall: list[float] = []
    """The p50."""
    caller: list[float] = []
    consumer: list[float] = []
    broker: list[float] = []

    def cpu(self, of: Callable[[Sequence[float]], float]) -> float:
        """Return what all the parties use whose processor time could be read, by `of` (min or median)."""
        return of([sum(one) for one in zip(*filter(None, (self.caller, self.consumer, self.broker)), strict=True)])


class Row(msgspec.Struct):
    """A row of the table."""

    ours: Way
    floor: Way | None = None
    bytes: int = 0
    """What the caller sends."""
    nova: tuple[int, int] | None = None
    """Wall and CPU."""


async def measure(rounds: int) -> list[Row]:
    """Send in every way in every round, after one that is thrown away. Raises: NoServer."""
    async with AsyncExitStack() as stack:
        memory = await stack.enter_async_context(_transport("memory://bench"))
        await _serve(memory, "bench")
        report = len(await _message(memory, CastMethod(HOST_REPORT.name, HostReport), _REPORT))
        build = len(await _message(memory, BUILD_INSTANCE, _BUILD))
        address = f"cellway-bench.{uuid4().hex}"
        connection = await stack.enter_async_context(_connected())
        stack.push_async_callback(_remove_queues, connection, address, await _has(connection, DEAD))
        consumer = await stack.enter_async_context(_consumer(address))
        rabbit = await stack.enter_async_context(_transport(_URL))
        one = (os.getpid(), None, None)
        all_three = (os.getpid(), consumer, _listener(PORT))
        rows = [
            Row(Way("call, memory://"), bytes=report),
            Row(Way("cast, memory://"), bytes=build),
            Row(Way("call, rabbit://"), Way("echo"), report, (1360, 1800)),
            Row(Way("cast, rabbit://"), Way("confirmed"), build),
        ]
        sends: list[tuple[Way | None, _Send, _Parties]] = [
            (rows[0].ours, _call(memory, "bench"), one),
            (rows[1].ours, _cast(memory, "bench"), one),
            (rows[2].ours, _call(rabbit, address), all_three),
            (rows[2].floor, await _echo(connection, address, report), all_three),
            (rows[3].ours, _cast(rabbit, address), all_three),
            (rows[3].floor, await _confirmed(connection, address, build), all_three),
        ]
        for number in range(rounds + 1):
            for way, send, parties in sends:
                figures = await _figures(send, parties)
                if number and way is not None:
                    for kept, figure in zip((way.wall, way.caller, way.consumer, way.broker), figures, strict=True):
                        if figure is not None:
                            kept.append(round(figure, 1))
    return rows


async def _figures(send: _Send, parties: _Parties) -> list[float | None]:
    """Return the p50 of the wall time, and each party's processor time."""
    before = list(map(_cpu_microseconds, parties))
    took = []
    for _ in range(MESSAGES):
        began = time.perf_counter()
        await send()
        took.append(time.perf_counter() - began)
    after = map(_cpu_microseconds, parties)
    return [
        median(took) * 1e6,
        *(None if a is None or b is None else (b - a) / MESSAGES for a, b in zip(before, after, strict=True)),
    ]


def _cpu_microseconds(process: int | None) -> float | None:
    if process is None:
        return None
    try:
        # Linux's clock of another process, to the nanosecond; /proc counts in steps of 10 ms.
        return time.clock_gettime_ns(~process << 3 | 2) / 1000
    except OSError:
        return None


def _listener(port: int) -> int | None:
    """Return the process that listens on a port of this machine, if we may know it."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for fields in map(str.split, Path(table).read_text().splitlines()):
                if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
                    return _holder(f"socket:[{fields[9]}]")
    return None


def _holder(file: str) -> int | None:
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(descriptor.readlink()) == file:
                return int(descriptor.parts[2])
    return None


# ---- the report ------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Return the figures as a table of at most 100 columns."""
    head = (
        f"{'µs per message':16}{'wall, p50':>13}{'floor':>7}{'times':>6}{'CPU of each, min':>23}{'of all':>12}"
        f"{'floor':>7}{'times':>6}{'Nova':>10}\n"
        f"{'':16}{'min':>6}{'median':>7}{'min':>7}{'':6}{'caller':>7}{'consumer':>9}{'broker':>7}{'min':>5}{'median':>7}"
        f"{'min':>7}{'':6}{'wall':>5}{'CPU':>5}\n"
    )
    return head + "\n".join(map(_line, rows))


def _line(row: Row) -> str:
    ours, floor = row.ours, row.floor
    line = f"{ours.name:16}{min(ours.wall):6.0f}{median(ours.wall):7.0f}"
    line += f"{min(floor.wall):7.0f}{min(ours.wall) / min(floor.wall):6.1f}" if floor else f"{'-':>7}{'-':>6}"
    for figures, width in ((ours.caller, 7), (ours.consumer, 9), (ours.broker, 7)):
        line += f"{min(figures):{width}.0f}" if figures else f"{'-':>{width}}"
    line += f"{ours.cpu(min):5.0f}{ours.cpu(median):7.0f}"
    line += f"{floor.cpu(min):7.0f}{ours.cpu(min) / floor.cpu(min):6.1f}" if floor else f"{'-':>7}{'-':>6}"
    wall, cpu = row.nova or ("-", "-")
    return line + f"{wall:>5}{cpu:>5}"


def how(rows: Sequence[Row]) -> str:
    """Say how it was measured."""
    sizes = " and ".join(sorted({f"{row.bytes} bytes ({row.ours.name.partition(',')[0]})" for row in rows}))
    return (
        f"{len(rows[0].ours.wall)} rounds of all in turn, after one to warm up: {MESSAGES} messages each, one after\n"
        f"the other, of {sizes}. A cast: until the queue has confirmed it.\n"
        "CPU: user and system time of each process, all threads. Over memory:// caller and consumer are one. The\n"
        "broker's is read only here, and as root; it holds what others do there meanwhile.\n"
        "Floor: aio-pika alone, with as many bytes: an echo by direct reply-to, unconfirmed and unacknowledged;\n"
        "a persistent message into a quorum queue, confirmed and acknowledged."
    )


# ---- ours ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _transport(url: str) -> AsyncIterator[Transport]:
    transports = Transports(MemoryBrokers(), Limits(), SystemClock())
    try:
        yield transports.lease(Secret(url))
    finally:
        await transports.aclose()


def _context(transport: Transport) -> RequestContext:
    return replace(service_context(RequestId(f"req-{uuid4()}")), mq_connection=transport)


def _call(transport: Transport, address: str) -> _Send:
    return partial(call, _context(transport), HOST_REPORT, _REPORT, address=address, timeout_seconds=_DEADLINE_SECONDS)


def _cast(transport: Transport, address: str) -> _Send:
    return partial(
        cast, _context(transport), BUILD_INSTANCE, _BUILD, address=address, timeout_seconds=_DEADLINE_SECONDS
    )


async def _serve(transport: Transport, address: str) -> None:
    async def accept(_ctx: RequestContext, _request: HostReport) -> Done:
        return Done(accepted=True)

    async def build(_ctx: RequestContext, _request: BuildInstance) -> None:
        pass

    handlers = Handlers()
    handlers.on_call(HOST_REPORT, accept)
    handlers.on_cast(BUILD_INSTANCE, build)
    await serve(transport, address, handlers, Limits())


async def _message(transport: Transport, method: CastMethod[Any], request: msgspec.Struct) -> bytes:
    """Return what is sent for a request."""
    sent: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def take(message: bytes) -> None:
        sent.set_result(message)

    consumer = await transport.consume("tap", take)
    await cast(_context(transport), method, request, address="tap", timeout_seconds=_DEADLINE_SECONDS)
    await consumer.aclose()
    return await sent


# ---- the floor -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _connected() -> AsyncIterator[AbstractConnection]:
    try:
        connection = await aio_pika.connect(_URL, timeout=10)
    except (OSError, aio_pika.exceptions.AMQPError, TimeoutError) as error:
        raise NoServer(f"RabbitMQ is needed on 127.0.0.1:{PORT}, with the user guest and its virtual host /") from error
    async with connection:
        yield connection


async def _has(connection: AbstractConnection, queue: str) -> bool:
    channel = await connection.channel()
    try:
        await channel.get_queue(queue)
    except aio_pika.exceptions.ChannelNotFoundEntity:
        return False
    await channel.close()
    return True


async def _remove_queues(connection: AbstractConnection, address: str, others_dead: bool) -> None:
    channel = await connection.channel()
    for queue in (address, f"{address}.floor", *(() if others_dead else (DEAD,))):
        await channel.queue_delete(queue)


async def _echo(connection: AbstractConnection, address: str, size: int) -> _Send:
    channel = await connection.channel(publisher_confirms=False)
    answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(message: AbstractIncomingMessage) -> None:
        answers.put_nowait(message.body)

    await (await channel.get_queue(_REPLIES, ensure=False)).consume(take, no_ack=True)
    message = aio_pika.Message(bytes(size), correlation_id="1", reply_to=_REPLIES)

    async def send() -> None:
        await channel.default_exchange.publish(message, f"{address}.echo", mandatory=False)
        await answers.get()

    return send


async def _confirmed(connection: AbstractConnection, address: str, size: int) -> _Send:
    channel = await connection.channel()
    message = aio_pika.Message(bytes(size), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
    return partial(channel.default_exchange.publish, message, f"{address}.floor")


async def _serve_floor(connection: AbstractConnection, address: str) -> None:
    """Echo what is called, and acknowledge what is cast."""
    channel = await connection.channel(publisher_confirms=False)

    async def echo(message: AbstractIncomingMessage) -> None:
        answer = aio_pika.Message(message.body, correlation_id=message.correlation_id)
        await channel.default_exchange.publish(answer, message.reply_to or "", mandatory=False)

    async def acknowledge(message: AbstractIncomingMessage) -> None:
        await message.ack()

    await (await channel.declare_queue(f"{address}.echo", exclusive=True)).consume(echo, no_ack=True)
    quorum: dict[str, Any] = {"x-queue-type": "quorum"}
    await (await channel.declare_queue(f"{address}.floor", durable=True, arguments=quorum)).consume(acknowledge)


# ---- the consumers' process ------------------------------------------------------------------------------------


@asynccontextmanager
async def _consumer(address: str) -> AsyncIterator[int]:
    """Run the consumers for the length of the block; give the id of their process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, address, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not await process.stdout.readline():
            raise RuntimeError("the consumers could not begin")
        yield process.pid
    finally:
        process.stdin.close()
        await process.wait()


async def _consume(address: str) -> None:
    async with _transport(_URL) as transport, _connected() as connection:
        await _serve(transport, address)
        await _serve_floor(connection, address)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(_consume(sys.argv[1]))
