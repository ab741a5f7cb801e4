"""What a transport promises, shown on the queues of this process, and what the registry of transports promises."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cellway.config import Limits, Secret
from cellway.context import Transport
from cellway.errors import (
    CellHasNoQueue,
    CellwayError,
    Conflict,
    DeadlineExceeded,
    HostUnreachable,
    Invalid,
    Unavailable,
)
from cellway.rpc.transport import MemoryBrokers, MemoryTransport, NullTransport, Transports
from tests.brokers import Gate, echo

pytestmark = pytest.mark.anyio

LIMITS = Limits()


@dataclass
class FakeClock:
    """A clock that a test moves."""

    seconds: float = 1000.0

    def now(self) -> datetime:
        return datetime(2026, 1, 1)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def memory(limits: Limits = LIMITS) -> MemoryTransport:
    """Return a connection to a new broker."""
    return MemoryTransport(MemoryBrokers(), "cell", limits)


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else run until `condition` is true."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came true")


def request(transport: Transport, message: bytes = b"m", address: str = "a") -> asyncio.Task[bytes]:
    """Begin a call."""
    return asyncio.ensure_future(transport.request(address, message, timeout_seconds=60))


async def send(transport: Transport, message: bytes = b"m", address: str = "a") -> None:
    """Cast."""
    await transport.send(address, message, timeout_seconds=60)


# ---- the registry ----------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> FakeClock:
    """A clock that the test moves."""
    return FakeClock()


@pytest.fixture
async def transports(clock: FakeClock) -> AsyncIterator[Transports]:
    """A registry with room for two."""
    registry = Transports(MemoryBrokers(), Limits(open_transports=2, idle_seconds=300), clock)
    yield registry
    await registry.aclose()


async def test_one_transport_per_url(transports: Transports) -> None:
    """Leases of one URL share one transport, and another URL has another."""
    first = transports.lease(Secret("memory://one"))
    assert transports.lease(Secret("memory://one")) is first
    assert transports.lease(Secret("memory://two")) is not first


async def test_queues_are_separate(transports: Transports) -> None:
    """A message for cell A is seen by A's consumer alone, though B's consumes the same address."""
    seen: dict[str, list[bytes]] = {"memory://a": [], "memory://b": []}

    def consumer(url: str) -> Callable[[bytes], Awaitable[bytes]]:
        async def deliver(message: bytes) -> bytes:
            seen[url].append(message)
            return b""

        return deliver

    for url in seen:
        await transports.lease(Secret(url)).consume("conductor", consumer(url))
    await transports.lease(Secret("memory://a")).request("conductor", b"for a", timeout_seconds=60)
    assert seen == {"memory://a": [b"for a"], "memory://b": []}


async def test_idle_transports_close(transports: Transports, clock: FakeClock) -> None:
    """A transport without leases is closed after the idle time, not before; one that is leased never is."""
    held, idle = transports.lease(Secret("memory://held")), transports.lease(Secret("memory://idle"))
    transports.release(idle)
    clock.seconds += 299
    transports.expire_idle()
    assert transports.lease(Secret("memory://idle")) is idle
    transports.release(idle)
    clock.seconds += 300
    transports.expire_idle()
    assert transports.lease(Secret("memory://held")) is held
    assert transports.lease(Secret("memory://idle")) is not idle
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="closed"):
        await send(idle)


async def test_open_transports_are_bounded(transports: Transports, clock: FakeClock) -> None:
    """At the limit the one that was unused for longest makes room, and a lease is refused when all are in use."""
    one, two = transports.lease(Secret("memory://one")), transports.lease(Secret("memory://two"))
    with pytest.raises(Unavailable, match="in use"):
        transports.lease(Secret("memory://three"))
    transports.release(two)
    clock.seconds += 1
    transports.release(one)
    three = transports.lease(Secret("memory://three"))
    assert transports.lease(Secret("memory://one")) is one
    transports.release(three)
    assert transports.lease(Secret("memory://two")) is not two


async def test_closing_the_registry(transports: Transports) -> None:
    """After `aclose` nothing can be leased or sent, consumers are gone, and a lease may still be given back."""
    transport = transports.lease(Secret("memory://one"))
    consumer = await transport.consume("a", echo)
    await transports.aclose()
    await transports.aclose()
    transports.release(transport)
    await consumer.aclose()
    with pytest.raises(Unavailable, match="closed"):
        transports.lease(Secret("memory://one"))
    with pytest.raises(Unavailable, match="closed"):
        await send(transport)
    with pytest.raises(Unavailable, match="closed"):
        await transport.consume("a", echo)


def test_leasing_does_no_io(clock: FakeClock) -> None:
    """Transports are leased and given back without so much as an event loop."""
    registry = Transports(MemoryBrokers(), LIMITS, clock)
    for url in ("memory://one", "none:///"):
        leased = registry.lease(Secret(url))
        assert registry.lease(Secret(url)) is leased
        registry.release(leased)
        registry.release(leased)


@pytest.mark.parametrize("url", ["", "hunter2", "memory:hunter2", "://hunter2", "amqp+hunter2://x", "memory://", "[:"])
async def test_bad_urls(transports: Transports, url: str) -> None:
    """A URL of no known scheme, or without a name, is refused, and the refusal does not show it."""
    with pytest.raises(Invalid) as refusal:
        transports.lease(Secret(url))
    assert refusal.value.code in {"transport.unknown_scheme", "transport.bad_url"}
    assert "hunter2" not in f"{refusal.value!r} {refusal.value.fields}"


@settings(deadline=None, max_examples=60)  # a loaded machine is no failure
@given(secret=st.text(alphabet="abcdefgh0123456789%@:/é", min_size=8))
async def test_no_url_is_shown(secret: str) -> None:
    """Neither repr, errors nor logs show any part of a URL, whatever it holds."""
    registry = Transports(MemoryBrokers(), LIMITS, FakeClock())
    shown = []
    with capture_logs() as logs:
        for scheme in ("memory", "none", "unknown"):
            try:
                transport = registry.lease(Secret(f"{scheme}://x{secret}"))
                shown.append(repr(transport))
                await send(transport)
            except CellwayError as error:
                shown.append(f"{error!r} {error.fields}")
        shown.append(f"{registry!r} {vars(registry)}")
        await registry.aclose()
    assert secret not in f"{shown} {logs}"


async def test_null_transport_refuses() -> None:
    """cell0 has no queue: every use of its transport is an error, at once."""
    transport = NullTransport()
    with pytest.raises(CellHasNoQueue):
        await send(transport)
    with pytest.raises(CellHasNoQueue):
        await request(transport)
    with pytest.raises(CellHasNoQueue):
        await transport.consume("a", echo)


async def test_cell0_by_its_url(transports: Transports) -> None:
    """`none:///` gives the transport that refuses."""
    transport = transports.lease(Secret("none:///"))
    with pytest.raises(CellHasNoQueue):
        await send(transport)
    transports.release(transport)


# ---- memory:// -------------------------------------------------------------------------------------------------


async def test_only_consumer() -> None:
    """A second consumer of an address is refused and logged; the first goes on, and leaves its place free."""
    transport = memory()
    first = await transport.consume("a", echo)
    with capture_logs() as logs, pytest.raises(Conflict) as refusal:
        await transport.consume("a", echo)
    assert refusal.value.code == "consumer.exists"
    assert [(line["event"], line["log_level"]) for line in logs] == [("consumer_refused", "error")]
    assert await request(transport) == b"m"
    await first.aclose()
    await transport.consume("a", echo)
    await first.aclose()
    assert await request(transport) == b"m"


async def test_unroutable() -> None:
    """A message for an address that nobody consumes is an error at once, before a consumer came and after it left."""
    transport = memory()
    for _ in range(2):
        for attempt in (send(transport), request(transport)):
            with pytest.raises(HostUnreachable):
                await attempt
        consumer = await transport.consume("a", echo)
        await consumer.aclose()


async def test_size_limit() -> None:
    """A message over the limit is refused, and one of just that size is not."""
    transport = memory(Limits(message_bytes=8))
    await transport.consume("a", echo)
    assert await request(transport, b"x" * 8) == b"x" * 8
    for attempt in (send(transport, b"x" * 9), request(transport, b"x" * 9)):
        with pytest.raises(Invalid) as refusal:
            await attempt
        assert refusal.value.code == "message.too_large"


async def test_concurrency_limit() -> None:
    """A consumer works on so many messages at once and no more, and gets to all of them."""
    transport, gate = memory(Limits(consumer_concurrency=3)), Gate()
    await transport.consume("a", gate.deliver)
    calls = [request(transport, b"%d" % number) for number in range(10)]
    await until(lambda: len(gate.begun) == 3)
    gate.open.set()
    assert await asyncio.gather(*calls) == [b"re: %d" % number for number in range(10)]
    assert gate.most == 3


async def test_queue_limit() -> None:
    """A full queue refuses, and takes messages again when its consumer has caught up."""
    transport, gate = memory(Limits(consumer_concurrency=1)), Gate()
    await transport.consume("a", gate.deliver)
    for _ in range(LIMITS.queue_messages + 1):
        await send(transport)
    for attempt in (send(transport), request(transport)):
        with pytest.raises(Unavailable) as refusal:
            await attempt
        assert refusal.value.code == "message.queue_full"
    gate.open.set()
    await until(lambda: len(gate.done) == LIMITS.queue_messages + 1)
    assert await request(transport) == b"re: m"


async def test_a_lagging_consumer_slows_its_sender() -> None:
    """One sender in a loop does not fill the queue of a consumer that keeps up."""
    transport, seen = memory(Limits(consumer_concurrency=4)), list[bytes]()

    async def deliver(message: bytes) -> None:
        seen.append(message)

    consumer = await transport.consume("a", deliver)
    for _ in range(LIMITS.queue_messages * 2):
        await send(transport)
    await until(lambda: len(seen) >= LIMITS.queue_messages * 2)
    await consumer.aclose()
    assert len(seen) == LIMITS.queue_messages * 2


async def test_deadline() -> None:
    """A call that is not answered in time fails, and the error says that the outcome is unknown."""
    transport, gate = memory(), Gate()
    await transport.consume("a", gate.deliver)
    with pytest.raises(DeadlineExceeded, match="unknown"):
        await transport.request("a", b"m", timeout_seconds=0)
    gate.open.set()
    await until(lambda: gate.done == [b"m"])


async def test_calls_given_up_are_not_begun() -> None:
    """A call whose caller timed out or was cancelled while it waited in the queue never reaches the consumer."""
    transport, gate = memory(Limits(consumer_concurrency=1)), Gate()
    await transport.consume("a", gate.deliver)
    first = request(transport, b"first")
    await until(lambda: gate.begun == [b"first"])
    with pytest.raises(DeadlineExceeded):
        await transport.request("a", b"timed out", timeout_seconds=0)
    cancelled = request(transport, b"cancelled")
    await asyncio.sleep(0)
    cancelled.cancel()
    last = request(transport, b"last")
    gate.open.set()
    assert await first == b"re: first"
    assert await last == b"re: last"
    assert gate.begun == [b"first", b"last"]


async def test_graceful_close() -> None:
    """Closing finishes what was begun, refuses calls that were not, and keeps casts for the next consumer."""
    transport, gate = memory(Limits(consumer_concurrency=1)), Gate()
    consumer = await transport.consume("a", gate.deliver)
    begun = request(transport, b"begun")
    await until(lambda: gate.begun == [b"begun"])
    await send(transport, b"cast 1")
    waiting = request(transport, b"waiting")
    await send(transport, b"cast 2")
    closing = asyncio.ensure_future(consumer.aclose())
    with pytest.raises(Unavailable, match="before it began") as refusal:
        await waiting
    assert not isinstance(refusal.value, DeadlineExceeded)
    with pytest.raises(HostUnreachable):
        await send(transport)
    with pytest.raises(Conflict):
        await transport.consume("a", echo)
    assert not closing.done()
    gate.open.set()
    assert await begun == b"re: begun"
    await closing
    assert gate.begun == [b"begun"]

    successor = Gate()
    successor.open.set()
    await transport.consume("a", successor.deliver)
    await until(lambda: successor.done == [b"cast 1", b"cast 2"])


async def test_grace_ends() -> None:
    """What is not finished within the grace is cancelled: its call has an unknown outcome, its cast comes again."""
    transport, gate = memory(Limits(rpc_timeout_seconds=0)), Gate()
    consumer = await transport.consume("a", gate.deliver)
    call = request(transport, b"call")
    await send(transport, b"cast")
    await until(lambda: len(gate.begun) == 2)
    await consumer.aclose()
    with pytest.raises(DeadlineExceeded, match="unknown"):
        await call
    assert gate.done == []
    successor = Gate()
    await transport.consume("a", successor.deliver)
    await until(lambda: successor.begun == [b"cast"])


async def test_work_that_never_started_is_not_lost() -> None:
    """A cast whose work was cancelled before its first step comes again."""
    transport, gate = memory(Limits(rpc_timeout_seconds=0)), Gate()
    consumer = await transport.consume("a", gate.deliver)
    await send(transport, b"cast")
    assert gate.begun == []
    await asyncio.gather(consumer.aclose(), consumer.aclose())
    await transport.consume("a", gate.deliver)
    await until(lambda: gate.begun == [b"cast"])


@pytest.mark.parametrize("fault", [ValueError("secret content"), asyncio.CancelledError()])
async def test_consumer_outlives_its_work(fault: BaseException) -> None:
    """Work that raises is logged without content, its call fails at once, and the consumer goes on."""
    transport = memory(Limits(consumer_concurrency=1))

    async def deliver(message: bytes) -> bytes:
        if message == b"bad":
            raise fault
        return message

    await transport.consume("a", deliver)
    with capture_logs() as logs:
        await send(transport, b"bad")
        with pytest.raises(DeadlineExceeded, match="unknown"):
            await request(transport, b"bad")
        assert await request(transport, b"good") == b"good"
    assert [line["event"] for line in logs] == ["message_dropped"] * 2
    assert "secret content" not in str(logs)


async def test_a_call_without_an_answer() -> None:
    """A consumer that returns nothing to a call makes it fail at once rather than wait."""
    transport = memory()

    async def deliver(message: bytes) -> None:
        return None

    await transport.consume("a", deliver)
    with pytest.raises(DeadlineExceeded, match="no answer"):
        await request(transport)


async def test_context_variables_stay_apart() -> None:
    """Work runs with its consumer's context variables, not with those of the sender."""
    variable = ContextVar("variable", default="nobody")
    transport, seen = memory(), list[str]()

    async def deliver(message: bytes) -> bytes:
        seen.append(variable.get())
        variable.set("the work before")
        return b""

    variable.set("consumer")
    await transport.consume("a", deliver)
    variable.set("sender")
    await request(transport)
    await request(transport)
    assert seen == ["consumer", "consumer"]


async def test_messages_are_not_in_reprs() -> None:
    """The tasks that an event loop lists when it complains do not show what messages hold."""
    transport, gate = memory(), Gate()
    await transport.consume("a", gate.deliver)
    call = request(transport, b"secret content")
    await until(lambda: bool(gate.begun))
    assert "secret content" not in repr(asyncio.all_tasks())
    gate.open.set()
    await call
