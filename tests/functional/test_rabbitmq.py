"""What only a broker has: lost connections, silent brokers, restarts, dead letters, virtual hosts and passwords."""

import asyncio
import gc
import logging
import shutil
import ssl
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import aio_pika
import pytest
from structlog.testing import capture_logs

from cellway.config import Limits, Secret
from cellway.context import SystemClock, Transport
from cellway.errors import (
    Conflict,
    DeadlineExceeded,
    HostUnreachable,
    Invalid,
    OutcomeUnknown,
    Unavailable,
)
from cellway.rpc.amqp import DEAD, RabbitTransport
from cellway.rpc.transport import MemoryBrokers, Transports
from tests.brokers import Gate, Rabbit, echo, virtual_host
from tests.functional.test_transports import LIMITS, eventually, until
from tests.proxy import opened

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

HASTY = replace(LIMITS, broker_retry_most_seconds=0.2)
HELLO = b"AMQP"
"""What a client says first: a way that is cut at it takes connections, and resets them."""
IMPATIENT = replace(HASTY, broker_connect_seconds=1)
"""Where something is silent for good. On a machine that stalls an attempt may fail with these."""

Connect = Callable[..., RabbitTransport]


@pytest.fixture
async def connect(anyio_backend: str) -> AsyncIterator[Connect]:
    """A function that makes a transport of a URL."""
    made: list[RabbitTransport] = []

    def connected(url: Secret, limits: Limits = LIMITS) -> RabbitTransport:
        made.append(RabbitTransport(url.reveal(), limits, SystemClock()))
        return made[-1]

    yield connected
    await asyncio.gather(*(transport.aclose() for transport in made))


@pytest.fixture
def address() -> str:
    """An address that no other test uses."""
    return f"test.{uuid.uuid4().hex}"


# ---- addresses -------------------------------------------------------------------------------------------------


async def test_virtual_hosts_are_apart(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """A message for one virtual host is seen by its consumer alone, though another's consumes the same address."""
    with virtual_host() as other:
        if other == rabbit:
            pytest.skip("CELLWAY_TEST_RABBITMQ names the only virtual host")
        seen: dict[str, list[bytes]] = {"a": [], "b": []}
        transports = {"a": connect(rabbit.url()), "b": connect(other.url())}

        def consumer(name: str) -> Callable[[bytes], Awaitable[bytes]]:
            async def deliver(message: bytes) -> bytes:
                seen[name].append(message)
                return b""

            return deliver

        for name, transport in transports.items():
            await transport.consume(address, consumer(name))
        await transports["a"].request(address, b"for a", timeout_seconds=60)
        assert seen == {"a": [b"for a"], "b": []}
        await asyncio.gather(*(transport.aclose() for transport in transports.values()))


async def test_the_registry_makes_it(rabbit: Rabbit, address: str) -> None:
    """A `rabbit://` URL is leased without I/O, and the lease works."""
    registry = Transports(MemoryBrokers(), LIMITS, SystemClock())
    try:
        unused: Transport = registry.lease(Secret("rabbit://nobody:nothing@127.0.0.1:1/none"))
        registry.release(unused)
        transport = registry.lease(rabbit.url())
        await transport.consume(address, echo)
        assert await transport.request(address, b"m", timeout_seconds=60) == b"m"
    finally:
        await registry.aclose()


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "/vhost",
        "u:hunter2@",
        "u:hunter2@host:port/v",
        "u:hunter2@host:0/v",
        "u:hunter2@host:65536/v",
        "u:hunter2@host,/v",
        "u:hunter2@host/v?sssl=hunter2",
        "u:hun,ter2@host/v",
    ],
)
def test_bad_urls(rest: str) -> None:
    """A URL that names no host, no port that can be, or an unknown option is refused without being shown."""
    with pytest.raises(Invalid) as refusal:
        RabbitTransport(f"rabbit://{rest}", LIMITS, SystemClock())
    assert refusal.value.code == "transport.bad_url"
    assert "ter2" not in f"{refusal.value!r} {refusal.value.fields}"


async def test_long_addresses(rabbit: Rabbit, connect: Connect) -> None:
    """An address that does not fit into a queue's name is refused."""
    transport = connect(rabbit.url())
    for attempt in (
        transport.send("x" * 241, b"m", timeout_seconds=60),
        transport.request("x" * 241, b"m", timeout_seconds=60),
        transport.consume("x" * 241, echo),
    ):
        with pytest.raises(Invalid):
            await attempt


async def test_the_next_host_is_used(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """Hosts that refuse or say nothing are passed over, for sending and for consuming, and again after a loss."""
    with ExitStack() as stack:
        dead, silent, good = (stack.enter_context(opened(rabbit.port, rabbit.host)) for _ in range(3))
        dead.cut(HELLO)
        silent.hang()
        transport = connect(rabbit.url(1, dead.port, silent.port, good.port), IMPATIENT)
        await eventually(lambda: transport.consume(address, echo))
        assert await eventually(lambda: transport.request(address, b"m", timeout_seconds=60)) == b"m"
        await until(lambda: good.connections == 2)
        # Now the good one is lost, and another is there.
        good.refuse()
        dead.heal()
        assert await eventually(lambda: transport.request(address, b"m", timeout_seconds=5)) == b"m"
        await until(lambda: dead.connections == 2)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that only itself vouches for, with its key beside it as `.key`."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here to make a certificate")
    path = tmp_path_factory.mktemp("tls") / "broker.crt"
    making = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=broker"
    extra = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(path), "-keyout", str(path.with_suffix(".key"))]
    subprocess.run([*making.split(), *extra], check=True, capture_output=True)
    return path


async def test_tls(rabbit: Rabbit, connect: Connect, address: str, certificate: Path) -> None:
    """With `ssl=1` the line is encrypted and the broker's certificate checked, ours shown if it is asked for."""
    key = certificate.with_suffix(".key")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificate)
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    with opened(rabbit.port, rabbit.host, tls=context) as line:
        plain = rabbit.url(line.port).reveal()
        trusting = f"{plain}?ssl=1&ssl_ca_file={certificate}"
        full = f"{trusting}&ssl_cert_file={certificate}&ssl_key_file={key}"
        transport = connect(Secret(full))
        await transport.consume(address, echo)
        assert await transport.request(address, b"m", timeout_seconds=60) == b"m"
        amqps = connect(Secret(full.replace("rabbit://", "amqps://").replace("ssl=1&", "")))
        assert await amqps.request(address, b"m", timeout_seconds=60) == b"m"
        elsewhere = full.replace("127.0.0.1", "localhost")
        for refused in (plain, f"{plain}?ssl=1", trusting, elsewhere):
            with pytest.raises(Unavailable) as refusal:
                await connect(Secret(refused), HASTY).send(address, b"m", timeout_seconds=60)
            assert refusal.value.code == "broker.unreachable"


# ---- one consumer ----------------------------------------------------------------------------------------------


async def test_a_lingering_connection_is_waited_for(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """A consumer takes the place of one whose connection is dead, though the broker has not noticed yet."""
    with opened(rabbit.port, rabbit.host) as line:
        dead = connect(rabbit.url(line.port), HASTY)
        await dead.consume(address, echo)
        line.hang()
        await connect(rabbit.url(), replace(LIMITS, broker_heartbeat_seconds=10)).consume(address, echo)
        assert await connect(rabbit.url()).request(address, b"m", timeout_seconds=60) == b"m"
        await dead.aclose()


async def test_queues_declared_otherwise(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """A consumer whose limits do not agree with the queue that exists is told so, and does not replace it."""
    consumer = await connect(rabbit.url()).consume(address, echo)
    await consumer.aclose()
    other = connect(rabbit.url(), replace(LIMITS, queue_messages=7))
    with pytest.raises(Conflict) as refusal:
        await other.consume(address, echo)
    assert refusal.value.code == "queue.declared_otherwise"
    await connect(rabbit.url()).consume(address, echo)


# ---- casts are not lost ----------------------------------------------------------------------------------------


async def test_casts_wait_for_a_restarting_consumer(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """What was sent while the consumer was gone is delivered when it is back."""
    first = connect(rabbit.url())
    await first.consume(address, echo)
    await first.aclose()
    sender = connect(rabbit.url())
    await sender.send(address, b"while you were out", timeout_seconds=60)
    with pytest.raises(HostUnreachable):
        await sender.request(address, b"m", timeout_seconds=60)
    gate = Gate()
    gate.open.set()
    await connect(rabbit.url()).consume(address, gate.deliver)
    await until(lambda: gate.done == [b"while you were out"])


async def test_redelivery(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """A consumer whose connection dies comes back by itself, and a cast that it had not acknowledged comes again."""
    with opened(rabbit.port, rabbit.host) as line:
        gate, sender = Gate(), connect(rabbit.url())
        consumer = await connect(rabbit.url(line.port), HASTY).consume(address, gate.deliver)
        await sender.send(address, b"m", timeout_seconds=60)
        await until(lambda: gate.begun == [b"m"])
        with capture_logs() as logs:
            line.reset()
            await until(lambda: gate.begun == [b"m", b"m"])
            gate.open.set()
            await until(lambda: gate.done == [b"m", b"m"])
        assert {line["event"] for line in logs} >= {"consumer_lost", "consumer_restored"}
        assert await eventually(lambda: sender.request(address, b"call", timeout_seconds=10)) == b"re: call"
        await consumer.aclose()
        # It was acknowledged: nobody gets it again.
        after = Gate()
        after.open.set()
        await sender.consume(address, after.deliver)
        await sender.send(address, b"next", timeout_seconds=60)
        await until(lambda: after.done == [b"next"])


async def test_a_consumer_comes_back_after_a_long_outage(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """Attempts go on while the broker is gone, with pauses between them, and end as soon as it is back."""
    with opened(rabbit.port, rabbit.host) as line:
        transport = connect(rabbit.url(line.port), HASTY)
        await transport.consume(address, echo)
        began = time.monotonic()
        line.cut(HELLO)
        line.reset()
        await until(lambda: line.cuts >= 10)
        # Pauses are between half of the longest and all of it, once they have grown.
        assert time.monotonic() - began > 5 * HASTY.broker_retry_most_seconds / 2
        line.heal()
        sender = connect(rabbit.url())
        assert await eventually(lambda: sender.request(address, b"m", timeout_seconds=10)) == b"m"


async def test_a_removed_queue_is_made_again(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """A consumer whose queue an operator removes declares it anew, and goes on."""
    gate, transport = Gate(), connect(rabbit.url(), HASTY)
    gate.open.set()
    await transport.consume(address, gate.deliver)
    await transport.send(address, b"before", timeout_seconds=60)
    await until(lambda: gate.done == [b"before"])
    await _remove(rabbit, address)
    await eventually(lambda: transport.send(address, b"after", timeout_seconds=10))
    await until(lambda: len(gate.done) == 2)
    assert gate.done == [b"before", b"after"]


async def test_dead_letters(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """A cast that fails is laid among the dead ones; so is one that kills its consumer time and again."""
    limits = replace(LIMITS, queue_deliveries=2, rpc_timeout_seconds=0.05)

    async def fail(message: bytes) -> None:
        raise ValueError("no")

    first = await connect(rabbit.url(), limits).consume(address, fail)
    await _purge(rabbit, DEAD)
    sender = connect(rabbit.url())
    failed, deadly = f"failed {address}".encode(), f"deadly {address}".encode()
    await sender.send(address, failed, timeout_seconds=60)
    assert await _next_dead(rabbit) == failed
    await first.aclose()
    await sender.send(address, deadly, timeout_seconds=60)
    for _ in range(3):
        gate = Gate()
        consumer = await connect(rabbit.url(), limits).consume(address, gate.deliver)
        await until(lambda gate=gate: gate.begun == [deadly])  # type: ignore[misc]
        await consumer.aclose()
    assert await _next_dead(rabbit) == deadly


async def test_calls_do_not_outlive_their_callers(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """A call that expired in the queue is neither delivered nor kept among the dead ones."""
    gate, sender = Gate(), connect(rabbit.url())
    limits = replace(LIMITS, consumer_concurrency=1)
    await connect(rabbit.url(), limits).consume(address, gate.deliver)
    await _purge(rabbit, DEAD)
    first = asyncio.ensure_future(sender.request(address, b"first", timeout_seconds=60))
    await until(lambda: gate.begun == [b"first"])
    with pytest.raises(DeadlineExceeded):
        await sender.request(address, b"late", timeout_seconds=0.1)
    gate.open.set()
    await first
    # A broker that did not even confirm the call in time is left alone for a moment.
    assert await eventually(lambda: sender.request(address, b"last", timeout_seconds=60)) == b"re: last"
    assert gate.begun == [b"first", b"last"]
    assert await _count(rabbit, DEAD) == 0


# ---- a broker that goes, or says nothing -----------------------------------------------------------------------


async def test_a_call_in_flight_when_the_connection_goes(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """Its caller is told at once that the outcome is unknown, and the next call works over a new connection."""
    with opened(rabbit.port, rabbit.host) as line:
        gate, caller = Gate(), connect(rabbit.url(line.port))
        await connect(rabbit.url()).consume(address, gate.deliver)
        in_flight = asyncio.ensure_future(caller.request(address, b"m", timeout_seconds=3600))
        await until(lambda: gate.begun == [b"m"])
        line.reset()
        with pytest.raises(DeadlineExceeded, match="unknown"):
            await in_flight
        gate.open.set()
        assert await eventually(lambda: caller.request(address, b"next", timeout_seconds=60)) == b"re: next"


async def test_a_cast_in_flight_when_the_connection_goes(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """A cast that the broker has and could not confirm has an unknown outcome, and says so at once."""
    with opened(rabbit.port, rabbit.host) as line:
        sender = connect(rabbit.url(line.port))
        await connect(rabbit.url()).consume(address, echo)
        await sender.send(address, b"m", timeout_seconds=60)
        line.cut(b"unconfirmed", times=1)
        with pytest.raises(OutcomeUnknown, match="may have it"):
            await sender.send(address, b"unconfirmed", timeout_seconds=3600)
        assert line.cuts == 1
        await eventually(lambda: sender.send(address, b"m", timeout_seconds=60))


async def test_a_blocked_broker(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """What a broker does not confirm fails by its deadline, then at once; nothing is wedged when it reads again.

    Calls that wait for their answers are not disturbed.
    """
    with opened(rabbit.port, rabbit.host) as line:
        # A broker with an alarm misses no heartbeats, but the proxy keeps them from it.
        gate, sender = Gate(), connect(rabbit.url(line.port), replace(HASTY, broker_heartbeat_seconds=60))
        await connect(rabbit.url()).consume(address, gate.deliver)
        in_flight = asyncio.ensure_future(sender.request(address, b"call", timeout_seconds=60))
        await until(lambda: gate.begun == [b"call"])
        line.hold()
        with capture_logs() as logs:
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded) as refusal:
                await sender.send(address, b"cast", timeout_seconds=0.5)
            assert refusal.value.code == "message.unconfirmed"
            with pytest.raises(Unavailable):
                await sender.send(address, b"cast", timeout_seconds=0.5)
            assert time.monotonic() - began < 30
        assert "broker_silent" in [line["event"] for line in logs]
        gate.open.set()
        assert await in_flight == b"re: call"
        line.heal()
        await eventually(lambda: sender.send(address, b"after", timeout_seconds=60))
        await until(lambda: b"after" in gate.done)
        assert await sender.request(address, b"again", timeout_seconds=60) == b"re: again"


async def test_large_messages_to_a_blocked_broker(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """Messages that fill every buffer on the way do not hold a sender beyond its deadline, nor its closing."""
    with opened(rabbit.port, rabbit.host) as line:
        sender = connect(rabbit.url(line.port), IMPATIENT)
        await connect(rabbit.url()).consume(address, echo)
        await eventually(lambda: sender.send(address, b"m", timeout_seconds=60))
        line.hold()
        body = b"x" * LIMITS.message_bytes
        sends = [sender.send(address, body, timeout_seconds=1) for _ in range(32)]
        outcomes = await asyncio.wait_for(asyncio.gather(*sends, return_exceptions=True), 60)
        assert {type(outcome) for outcome in outcomes} <= {DeadlineExceeded, Unavailable, OutcomeUnknown}
        await asyncio.wait_for(sender.aclose(), 60)


async def test_no_retry_storm(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """However many want to send, a broker that is gone sees one attempt, and no more until the pause is over."""
    with opened(rabbit.port, rabbit.host) as line:
        line.cut(HELLO)
        limits = replace(LIMITS, broker_retry_seconds=3600, broker_retry_most_seconds=3600)
        sender = connect(rabbit.url(line.port), limits)
        attempts = [sender.send(address, b"m", timeout_seconds=60) for _ in range(50)]
        attempts += [sender.request(address, b"m", timeout_seconds=60) for _ in range(50)]  # type: ignore[misc]
        for outcome in await asyncio.gather(*attempts, return_exceptions=True):
            assert isinstance(outcome, Unavailable)
            assert outcome.code == "broker.unreachable"
        for _ in range(50):
            with pytest.raises(Unavailable, match="cannot be reached"):
                await sender.send(address, b"m", timeout_seconds=60)
        assert line.accepted == 1


async def test_connecting_is_under_the_deadline(rabbit: Rabbit, connect: Connect, address: str) -> None:
    """A broker that accepts and says nothing holds a sender no longer than its deadline."""
    with opened(rabbit.port, rabbit.host) as line:
        line.hang()
        sender = connect(rabbit.url(line.port), Limits(broker_connect_seconds=3600))
        for attempt in (
            sender.send(address, b"m", timeout_seconds=0.2),
            sender.request(address, b"m", timeout_seconds=0.2),
        ):
            with pytest.raises(Unavailable, match="in time"):
                await asyncio.wait_for(attempt, 60)
        await until(lambda: line.accepted > 0)
        assert line.accepted == 1


# ---- secrets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["password", "vhost", "port", "host", "tls", "certificate"])
async def test_nothing_secret_is_shown(
    rabbit: Rabbit, connect: Connect, address: str, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever of a URL is wrong, no error, log line, repr or complaint of the event loop shows its secrets."""
    caplog.set_level(logging.DEBUG)
    secret = f"pä%s/{uuid.uuid4().hex}"
    url = {
        "password": rabbit.url(password=secret),
        "vhost": rabbit.url(vhost=secret),
        "port": rabbit.url(1, password=secret),
        "host": Secret(f"rabbit://u:{secret.replace('/', '')}@no-such-host.invalid/v"),
        "tls": Secret(f"{rabbit.url(password=secret).reveal()}?ssl=1"),
        "certificate": Secret(f"{rabbit.url(password=secret).reveal()}?ssl=1&ssl_ca_file=/no/such/{secret[-8:]}"),
    }[wrong]
    shown: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, complaint: shown.append(complaint))
    transport = connect(url, LIMITS)
    with capture_logs() as logs:
        for attempt in (
            transport.send(address, b"m", timeout_seconds=60),
            transport.request(address, b"m", timeout_seconds=60),
            transport.consume(address, echo),
        ):
            with pytest.raises(Unavailable) as refusal:
                await attempt
            assert refusal.value.code == "broker.unreachable"
            error = refusal.value
            shown.append(f"{error!r} {error.fields} {error.__cause__!r} {error.__suppress_context__}")
        shown.append(f"{transport!r} {vars(transport)}")
        await transport.aclose()
        del transport
        gc.collect()
    assert "broker_unreachable" in [line["event"] for line in logs]
    everything = f"{shown} {logs} {caplog.text}"
    for form in (secret[-8:], secret, url.reveal()):
        assert form not in everything


# ---- helpers ---------------------------------------------------------------------------------------------------


async def _channel(rabbit: Rabbit) -> tuple[aio_pika.abc.AbstractConnection, aio_pika.abc.AbstractChannel]:
    connection = await aio_pika.connect(
        host=rabbit.host, port=rabbit.port, login=rabbit.user, password=rabbit.password, virtualhost=rabbit.vhost
    )
    return connection, await connection.channel()


async def _remove(rabbit: Rabbit, queue: str) -> None:
    connection, channel = await _channel(rabbit)
    await channel.queue_delete(queue)
    await connection.close()


async def _purge(rabbit: Rabbit, queue: str) -> None:
    connection, channel = await _channel(rabbit)
    await (await channel.get_queue(queue)).purge()
    await connection.close()


async def _count(rabbit: Rabbit, queue: str) -> int:
    connection, channel = await _channel(rabbit)
    declared = await channel.declare_queue(queue, passive=True)
    await connection.close()
    return declared.declaration_result.message_count or 0


async def _next_dead(rabbit: Rabbit) -> bytes:
    connection, channel = await _channel(rabbit)
    queue = await channel.get_queue(DEAD)
    end = time.monotonic() + 60
    while (message := await queue.get(no_ack=True, fail=False)) is None:
        assert time.monotonic() < end, "nothing was laid among the dead"
        await asyncio.sleep(0.05)
    await connection.close()
    return message.body
