"""What every transport promises, shown on the queues of this process and on RabbitMQ alike."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import TypeVar

import pytest
from structlog.testing import capture_logs

from cellway.config import Limits, Secret
from cellway.context import RequestContext, SystemClock, Transport
from cellway.errors import Conflict, DeadlineExceeded, HostUnreachable, Invalid, NotFound, Unavailable
from cellway.ids import ProjectId, RequestId, UserId
from cellway.rpc.calls import DESTROY_INSTANCE, START_BUILD, DestroyInstance, Done, StartBuild
from cellway.rpc.messaging import Handlers, call, cast, serve
from cellway.rpc.transport import MemoryBrokers, Transports
from tests.brokers import Gate, Rabbit, echo

pytestmark = pytest.mark.anyio

LIMITS = Limits(broker_heartbeat_seconds=1, broker_connect_seconds=20, rpc_timeout_seconds=60)

Connect = Callable[[Limits], Transport]
T = TypeVar("T")


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` is true."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.01)


async def eventually(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try until the broker is there."""
    end = time.monotonic() + 60
    while True:
        try:
            return await attempt()
        except Unavailable:
            assert time.monotonic() < end, "it never came back"
            await asyncio.sleep(0.02)


@pytest.fixture(params=["memory", "rabbit"])
async def connect(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Connect]:
    """A function that makes another connection to the same queues."""
    if request.param == "rabbit":
        rabbit: Rabbit = request.getfixturevalue("rabbit")
        url = rabbit.url()
    else:
        url = Secret("memory://cell")
    brokers, registries = MemoryBrokers(), list[Transports]()

    def made(limits: Limits) -> Transport:
        registries.append(Transports(brokers, limits, SystemClock()))
        return registries[-1].lease(url)

    yield made
    for registry in registries:
        await registry.aclose()


@pytest.fixture
def address() -> str:
    """An address that no other test uses."""
    return f"test.{uuid.uuid4().hex}"


async def test_calls_and_casts_arrive_unchanged(connect: Connect, address: str) -> None:
    """Whatever bytes are sent arrive, once, at the consumer on another connection, and its answers come back."""
    seen: list[bytes] = []

    async def deliver(message: bytes) -> bytes:
        seen.append(message)
        return message[::-1]

    await connect(LIMITS).consume(address, deliver)
    sender = connect(LIMITS)
    messages = [b"", b"\0\xff", b"x" * LIMITS.message_bytes]
    for message in messages:
        await sender.send(address, message, timeout_seconds=60)
    for message in messages:
        assert await sender.request(address, message, timeout_seconds=60) == message[::-1]
    await until(lambda: len(seen) == 6)
    assert sorted(seen) == sorted(messages * 2)


async def test_only_consumer(connect: Connect, address: str) -> None:
    """A second consumer is refused and logged, on the same connection and on another; a closed one gives its place."""
    transport = connect(LIMITS)
    first = await transport.consume(address, echo)
    for other in (transport, connect(LIMITS)):
        with capture_logs() as logs, pytest.raises(Conflict, match=address) as refusal:
            await other.consume(address, echo)
        assert refusal.value.code == "consumer.exists"
        assert ("consumer_refused", "error") in [(line["event"], line["log_level"]) for line in logs]
    assert await transport.request(address, b"m", timeout_seconds=60) == b"m"
    await first.aclose()
    second = connect(LIMITS)
    await second.consume(address, echo)
    await first.aclose()
    assert await transport.request(address, b"m", timeout_seconds=60) == b"m"


async def test_unroutable(connect: Connect, address: str) -> None:
    """What nobody ever consumed cannot be sent to, and calls fail at once also when the consumer has left."""
    transport = connect(LIMITS)
    for attempt in (
        transport.send(address, b"m", timeout_seconds=60),
        transport.request(address, b"m", timeout_seconds=60),
    ):
        with pytest.raises(HostUnreachable) as refusal:
            await attempt
        assert refusal.value.code == "message.unroutable"
    consumer = await transport.consume(address, echo)
    await consumer.aclose()
    with pytest.raises(HostUnreachable):
        await transport.request(address, b"m", timeout_seconds=60)


async def test_size_limit(connect: Connect, address: str) -> None:
    """A message over the limit is refused, and one of just that size is not."""
    transport = connect(replace(LIMITS, message_bytes=8))
    await transport.consume(address, echo)
    assert await transport.request(address, b"x" * 8, timeout_seconds=60) == b"x" * 8
    for attempt in (
        transport.send(address, b"x" * 9, timeout_seconds=60),
        transport.request(address, b"x" * 9, timeout_seconds=60),
    ):
        with pytest.raises(Invalid) as refusal:
            await attempt
        assert refusal.value.code == "message.too_large"


async def test_concurrency_limit(connect: Connect, address: str) -> None:
    """A consumer works on so many calls at once and no more, and gets to all of them."""
    transport, gate = connect(replace(LIMITS, consumer_concurrency=3)), Gate()
    await transport.consume(address, gate.deliver)
    calls = [
        asyncio.ensure_future(transport.request(address, b"%d" % number, timeout_seconds=60)) for number in range(10)
    ]
    await until(lambda: len(gate.begun) == 3)
    gate.open.set()
    assert await asyncio.gather(*calls) == [b"re: %d" % number for number in range(10)]
    assert gate.most == 3


async def test_queue_limit(connect: Connect, address: str) -> None:
    """A full queue refuses casts, and takes them again when its consumer has caught up; none that it took is lost."""
    transport, gate = connect(replace(LIMITS, consumer_concurrency=1, queue_messages=5)), Gate()
    await transport.consume(address, gate.deliver)
    taken = 0

    async def fill() -> None:
        nonlocal taken
        for _ in range(100):
            await transport.send(address, b"%d" % taken, timeout_seconds=60)
            taken += 1

    with pytest.raises(Unavailable) as refusal:
        await fill()
    assert refusal.value.code == "message.queue_full"
    assert taken >= 5
    gate.open.set()
    await until(lambda: len(gate.done) == taken)
    await transport.send(address, b"one more", timeout_seconds=60)
    await until(lambda: gate.done[-1] == b"one more")
    assert gate.done[:-1] == [b"%d" % number for number in range(taken)]


async def test_deadline(connect: Connect, address: str) -> None:
    """A call that is not answered in time fails, and the error says that the outcome is unknown."""
    transport, gate = connect(LIMITS), Gate()
    await transport.consume(address, gate.deliver)
    # So that the deadline does not pass while the connection is made.
    await transport.send(address, b"cast", timeout_seconds=60)
    with pytest.raises(DeadlineExceeded, match="unknown"):
        await transport.request(address, b"m", timeout_seconds=1)
    gate.open.set()


async def test_calls_given_up_are_not_begun(connect: Connect, address: str) -> None:
    """A call whose caller timed out while it waited in the queue never reaches the consumer."""
    transport, gate = connect(replace(LIMITS, consumer_concurrency=1)), Gate()
    await transport.consume(address, gate.deliver)
    first = asyncio.ensure_future(transport.request(address, b"first", timeout_seconds=60))
    await until(lambda: gate.begun == [b"first"])
    with pytest.raises(DeadlineExceeded):
        await transport.request(address, b"timed out", timeout_seconds=0.2)
    # A broker that did not even confirm the call in time is left alone for a moment.
    last = asyncio.ensure_future(eventually(lambda: transport.request(address, b"last", timeout_seconds=60)))
    gate.open.set()
    assert await first == b"re: first"
    assert await last == b"re: last"
    assert gate.begun == [b"first", b"last"]


async def test_graceful_close(connect: Connect, address: str) -> None:
    """Closing finishes what was begun, refuses calls that were not, and keeps casts for the next consumer."""
    limits = replace(LIMITS, consumer_concurrency=1)
    transport, sender, gate = connect(limits), connect(limits), Gate()
    consumer = await transport.consume(address, gate.deliver)
    begun = asyncio.ensure_future(sender.request(address, b"begun", timeout_seconds=60))
    await until(lambda: gate.begun == [b"begun"])
    waiting = asyncio.ensure_future(sender.request(address, b"waiting", timeout_seconds=60))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(consumer.aclose())
    with pytest.raises(Unavailable, match=r"before it began|Nobody consumes"):
        await waiting
    with pytest.raises(Conflict):
        await transport.consume(address, echo)
    assert not closing.done()
    gate.open.set()
    assert await begun == b"re: begun"
    await closing
    assert gate.begun == [b"begun"]


async def test_casts_wait_for_the_next_consumer(connect: Connect, address: str) -> None:
    """Casts that a closing consumer did not begin, or could not finish within the grace, come again, in order."""
    limits = replace(LIMITS, consumer_concurrency=1, rpc_timeout_seconds=0.1)
    transport, gate = connect(limits), Gate()
    consumer = await transport.consume(address, gate.deliver)
    for number in range(3):
        await transport.send(address, b"cast %d" % number, timeout_seconds=60)
    await until(lambda: gate.begun == [b"cast 0"])
    await consumer.aclose()
    assert gate.done == []
    successor = Gate()
    successor.open.set()
    await transport.consume(address, successor.deliver)
    await until(lambda: len(successor.done) == 3)
    assert successor.done == [b"cast 0", b"cast 1", b"cast 2"]


async def test_calls_in_work_when_the_grace_ends(connect: Connect, address: str) -> None:
    """A call that is not finished within the grace is cancelled, and its caller told that the outcome is unknown."""
    consumer_side, caller, gate = connect(replace(LIMITS, rpc_timeout_seconds=0.5)), connect(LIMITS), Gate()
    consumer = await consumer_side.consume(address, gate.deliver)
    call_in_vain = asyncio.ensure_future(caller.request(address, b"m", timeout_seconds=60))
    await until(lambda: len(gate.begun) == 1)
    await consumer.aclose()
    with pytest.raises(DeadlineExceeded, match="unknown"):
        await call_in_vain
    assert gate.done == []


@pytest.mark.parametrize("fault", [ValueError("secret content"), asyncio.CancelledError()])
async def test_consumer_outlives_its_work(connect: Connect, address: str, fault: BaseException) -> None:
    """Work that raises is logged without content, its call fails at once, and the consumer goes on."""
    transport = connect(replace(LIMITS, consumer_concurrency=1))

    async def deliver(message: bytes) -> bytes:
        if message == b"bad":
            raise fault
        return message

    await transport.consume(address, deliver)
    with capture_logs() as logs:
        await transport.send(address, b"bad", timeout_seconds=60)
        with pytest.raises(DeadlineExceeded, match="unknown"):
            await transport.request(address, b"bad", timeout_seconds=60)
        assert await transport.request(address, b"good", timeout_seconds=60) == b"good"
        await until(lambda: [line["event"] for line in logs] == ["message_dropped"] * 2)
    assert "secret content" not in str(logs)


async def test_a_call_without_an_answer(connect: Connect, address: str) -> None:
    """A consumer that returns nothing to a call makes it fail at once rather than wait."""

    async def deliver(message: bytes) -> None:
        return None

    transport = connect(LIMITS)
    await transport.consume(address, deliver)
    with pytest.raises(DeadlineExceeded, match="no answer"):
        await transport.request(address, b"m", timeout_seconds=60)


async def test_context_variables_stay_apart(connect: Connect, address: str) -> None:
    """Work runs with its consumer's context variables, not with those of the sender or of other work."""
    variable = ContextVar("variable", default="nobody")
    transport, seen = connect(LIMITS), list[str]()

    async def deliver(message: bytes) -> bytes:
        seen.append(variable.get())
        variable.set("the work before")
        return b""

    variable.set("consumer")
    await transport.consume(address, deliver)
    variable.set("sender")
    for _ in range(2):
        await transport.request(address, b"m", timeout_seconds=60)
    assert seen == ["consumer", "consumer"]


async def test_many_at_once(connect: Connect, address: str) -> None:
    """Calls and casts of many senders at once are all carried out, each once, and answers reach their callers."""
    transport, senders, seen = connect(LIMITS), [connect(LIMITS) for _ in range(3)], list[bytes]()

    async def deliver(message: bytes) -> bytes:
        seen.append(message)
        return message

    await transport.consume(address, deliver)
    calls = [
        sender.request(address, b"call %d" % number, timeout_seconds=60) for sender in senders for number in range(100)
    ]
    casts = [
        sender.send(address, b"cast %d" % number, timeout_seconds=60) for sender in senders for number in range(100)
    ]
    answers, _ = await asyncio.gather(asyncio.gather(*calls), asyncio.gather(*casts))
    assert answers == [b"call %d" % number for _ in senders for number in range(100)]
    await until(lambda: len(seen) == 600)
    assert {seen.count(message) for message in seen} == {3}


async def test_closing(connect: Connect, address: str) -> None:
    """After the registry is closed nothing can be sent or consumed, and consumers are gone."""
    transport = connect(LIMITS)
    consumer = await transport.consume(address, echo)
    await transport.request(address, b"m", timeout_seconds=60)
    await transport.aclose()  # type: ignore[attr-defined]
    await consumer.aclose()
    for attempt in (
        transport.send(address, b"m", timeout_seconds=60),
        transport.request(address, b"m", timeout_seconds=60),
        transport.consume(address, echo),
    ):
        with pytest.raises(Unavailable, match="closed"):
            await attempt
    with pytest.raises(HostUnreachable):
        await connect(LIMITS).request(address, b"m", timeout_seconds=60)


async def test_methods(connect: Connect, address: str) -> None:
    """Typed calls, casts and errors cross every kind of queue, and the context of whoever asks with them."""
    limits, seen = LIMITS, list[tuple[str, str]]()

    async def start(ctx: RequestContext, request: StartBuild) -> Done:
        if request.attempt == 2:
            raise NotFound("instance.not_found", "it is gone", instance=request.instance_uuid)
        seen.append((ctx.request_id, request.instance_uuid))
        return Done(accepted=True)

    async def destroy(ctx: RequestContext, request: DestroyInstance) -> None:
        seen.append((ctx.request_id, request.instance_uuid))

    handlers = Handlers()
    handlers.on_call(START_BUILD, start)
    handlers.on_cast(DESTROY_INSTANCE, destroy)
    await serve(connect(limits), address, handlers, limits)
    ctx = RequestContext(
        user_id=UserId("u"), project_id=ProjectId("p"), request_id=RequestId("req-1"), mq_connection=connect(limits)
    )
    request = StartBuild(host="h", epoch=1, instance_uuid="one", attempt=1)
    assert await call(ctx, START_BUILD, request, address=address, timeout_seconds=60) == Done(accepted=True)
    with pytest.raises(NotFound) as failure:
        await call(
            ctx,
            START_BUILD,
            StartBuild(host="h", epoch=1, instance_uuid="two", attempt=2),
            address=address,
            timeout_seconds=60,
        )
    assert failure.value.fields == {"instance": "two"}
    await cast(ctx, DESTROY_INSTANCE, DestroyInstance(instance_uuid="three"), address=address, timeout_seconds=60)
    await until(lambda: seen == [("req-1", "one"), ("req-1", "three")])
