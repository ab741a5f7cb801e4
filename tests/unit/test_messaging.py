"""Calls, casts, contexts and errors as they cross a queue, and what hostile messages do to a consumer: nothing."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cellway import errors
from cellway.config import Limits, Secret
from cellway.context import RequestContext, Transport
from cellway.errors import CellHasNoQueue, CellNotTargeted, CellwayError, Conflict, Invalid, NotFound
from cellway.ids import ProjectId, RequestId, UserId
from cellway.rpc import calls
from cellway.rpc.calls import (
    CONDUCTOR,
    DESTROY_INSTANCE,
    HOST_REPORT,
    START_BUILD,
    CallMethod,
    DestroyInstance,
    Done,
    HostReport,
    Payload,
    StartBuild,
)
from cellway.rpc.messaging import VERSION, Handlers, call, cast, serve
from cellway.rpc.transport import MemoryBrokers, MemoryTransport, NullTransport

pytestmark = pytest.mark.anyio

LIMITS = Limits()
# A loaded machine is no failure.
EXAMPLES = settings(deadline=None, max_examples=60)
START = StartBuild(host="host1", epoch=1, instance_uuid="an instance", attempt=1)
TRAVELLERS = (
    errors.CellHasNoQueue,
    errors.CellUnavailable,
    errors.Conflict,
    errors.DeadlineExceeded,
    errors.Forbidden,
    errors.HostUnreachable,
    errors.Invalid,
    errors.NotFound,
    errors.OutcomeUnknown,
    errors.OverQuota,
    errors.Unavailable,
)


class Report(Payload, frozen=True, kw_only=True):
    """A payload with something of everything that messages may hold."""

    text: str
    number: int
    items: tuple[str, ...] = ()
    labels: Mapping[str, str | None] = {}


REPORT = CallMethod("report", Report, Report)


class Secretive(NotFound):
    """An error that this test alone knows."""


def memory() -> MemoryTransport:
    """Return a connection to a new broker."""
    return MemoryTransport(MemoryBrokers(), "cell", LIMITS)


def context(transport: Transport | None) -> RequestContext:
    """Return a context of some user, targeted at a transport."""
    return RequestContext(
        user_id=UserId("user"),
        project_id=ProjectId("project"),
        request_id=RequestId("req-1"),
        roles=frozenset({"member", "reader"}),
        db_connection="cell1:0123456789abcdef",
        mq_connection=transport,
    )


async def serving(*, start: Callable[[StartBuild], Done]) -> RequestContext:
    """Serve START_BUILD by a function and REPORT by an echo, and return a context targeted there."""

    async def start_build(ctx: RequestContext, request: StartBuild) -> Done:
        return start(request)

    async def report(ctx: RequestContext, request: Report) -> Report:
        return request

    handlers = Handlers()
    handlers.on_call(START_BUILD, start_build)
    handlers.on_call(REPORT, report)
    transport = memory()
    await serve(transport, CONDUCTOR, handlers, LIMITS)
    return context(transport)


def accept(request: StartBuild) -> Done:
    """Carry out START_BUILD."""
    return Done(accepted=True)


async def start_build(ctx: RequestContext) -> Done:
    """Call START_BUILD."""
    return await call(ctx, START_BUILD, START, address=CONDUCTOR, timeout_seconds=60)


async def raw(ctx: RequestContext, message: bytes) -> dict[str, Any]:
    """Send bytes as a call and return the answer as it is on the wire."""
    assert ctx.mq_connection is not None
    answer = await ctx.mq_connection.request(CONDUCTOR, message, timeout_seconds=60)
    decoded = msgspec.msgpack.decode(answer)
    assert isinstance(decoded, dict)
    return decoded


def envelope(**changes: object) -> bytes:
    """Return a well-formed START_BUILD as anyone could write it, with some parts replaced."""
    return msgspec.msgpack.encode(
        {
            "version": VERSION,
            "method": "start_build",
            "context": {"user_id": "u", "project_id": "p", "roles": ["member"], "request_id": "r"},
            "payload": {"host": "host1", "epoch": 1, "instance_uuid": "an instance", "attempt": 1},
            **changes,
        }
    )


# ---- round trips -----------------------------------------------------------------------------------------------


async def test_call() -> None:
    """A call hands over who asks and what, and the receiver's own transport but no database; the answer comes back."""
    seen: list[tuple[RequestContext, StartBuild]] = []

    async def handle(ctx: RequestContext, request: StartBuild) -> Done:
        seen.append((ctx, request))
        return Done(accepted=False)

    brokers, handlers = MemoryBrokers(), Handlers()
    receiver, sender = (MemoryTransport(brokers, "cell", LIMITS) for _ in range(2))
    handlers.on_call(START_BUILD, handle)
    await serve(receiver, CONDUCTOR, handlers, LIMITS)
    ctx = context(sender)
    assert await start_build(ctx) == Done(accepted=False)
    assert seen == [(replace(ctx, db_connection=None, mq_connection=receiver), START)]


async def test_cast() -> None:
    """A cast hands over its request, and an error of its handler is logged and ends nothing."""
    seen: list[str] = []

    async def handle(ctx: RequestContext, request: DestroyInstance) -> None:
        seen.append(request.instance_uuid)
        if request.instance_uuid == "bad":
            raise NotFound("instance.not_found", "no such instance")

    transport, handlers = memory(), Handlers()
    handlers.on_cast(DESTROY_INSTANCE, handle)
    consumer = await serve(transport, "compute.host1", handlers, LIMITS)
    with capture_logs() as logs:
        for instance in ("bad", "good"):
            request = DestroyInstance(instance_uuid=instance)
            await cast(context(transport), DESTROY_INSTANCE, request, address="compute.host1", timeout_seconds=60)
        await consumer.aclose()
    assert seen == ["bad", "good"]
    failed, dropped = logs
    assert (failed["event"], failed["method"], failed["request_id"]) == ("handler_failed", "destroy_instance", "req-1")
    assert failed["exc_info"]
    assert dropped["event"] == "message_dropped"


TEXT = st.text(alphabet=st.characters(exclude_characters="\0", codec="utf-8"))


@EXAMPLES
@given(
    report=st.builds(
        Report,
        text=TEXT,
        number=st.integers(-(2**63), 2**64 - 1),
        items=st.lists(TEXT).map(tuple),
        labels=st.dictionaries(TEXT, st.none() | TEXT),
    )
)
async def test_payloads_arrive_unchanged(report: Report) -> None:
    """Whatever texts and numbers a payload holds, the receiver gets the same, and its caller from the answer."""
    ctx = await serving(start=accept)
    assert await call(ctx, REPORT, report, address=CONDUCTOR, timeout_seconds=60) == report


@EXAMPLES
@given(secret=st.text(alphabet="abcdefgh0123456789", min_size=8))
async def test_no_connection_crosses(secret: str) -> None:
    """What leaves the process holds nothing of the context's connections."""
    sent: list[bytes] = []

    async def deliver(message: bytes) -> None:
        sent.append(message)

    transport = memory()
    consumer = await transport.consume(CONDUCTOR, deliver)
    ctx = replace(context(transport), db_connection=f"key of {secret}")
    request = DestroyInstance(instance_uuid="i")
    await cast(ctx, DESTROY_INSTANCE, request, address=CONDUCTOR, timeout_seconds=60)
    await consumer.aclose()
    assert len(sent) == 1
    assert secret.encode() not in sent[0]


async def test_untargeted_context() -> None:
    """Without a target there is no queue to send to, and no default one."""
    with pytest.raises(CellNotTargeted):
        await start_build(context(None))
    request = DestroyInstance(instance_uuid="i")
    with pytest.raises(CellNotTargeted):
        await cast(context(None), DESTROY_INSTANCE, request, address=CONDUCTOR, timeout_seconds=60)


async def test_cell0() -> None:
    """A call to cell0 says that it has no queue."""
    with pytest.raises(CellHasNoQueue):
        await start_build(context(NullTransport()))


async def test_newer_and_older_senders() -> None:
    """Fields that the receiver does not know are passed over."""
    ctx = await serving(start=accept)
    payload = {"host": "h", "epoch": 1, "instance_uuid": "i", "attempt": 1, "later": ["field"]}
    assert await raw(ctx, envelope(payload=payload, also="unknown")) == {
        "type": "result",
        "payload": {"accepted": True},
    }


async def test_one_handler_per_method() -> None:
    """A method cannot get a second handler."""

    async def handle(ctx: RequestContext, request: HostReport) -> Done:
        return Done(accepted=True)

    handlers = Handlers()
    handlers.on_call(HOST_REPORT, handle)
    with pytest.raises(Conflict):
        handlers.on_call(HOST_REPORT, handle)


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAVELLERS)
async def test_errors_travel(kind: type[CellwayError]) -> None:
    """An error on the list arrives as the same class, with the same code, sentence and fields."""
    fields: dict[str, Any] = {"text": "t", "number": -1, "ratio": 0.5, "flag": True, "nothing": None}

    def refuse(request: StartBuild) -> Done:
        raise kind("some.code", "Some sentence.", **fields)

    with capture_logs() as logs, pytest.raises(CellwayError) as raised:
        await start_build(await serving(start=refuse))
    assert type(raised.value) is kind
    assert (raised.value.code, raised.value.message, str(raised.value)) == (
        "some.code",
        "Some sentence.",
        "Some sentence.",
    )
    assert raised.value.fields == fields
    assert logs == []


async def test_fields_are_made_simple() -> None:
    """A field that is no plain value travels as its text, so a Secret stays one; no name of a field is special."""

    def refuse(request: StartBuild) -> Done:
        error = NotFound("some.code", "Some sentence.")
        error.fields = {"code": "c", "message": "m", "self": "s", "url": Secret("hunter2"), "huge": 2**70, "many": [1]}
        raise error

    with pytest.raises(NotFound) as raised:
        await start_build(await serving(start=refuse))
    expected = {"code": "c", "message": "m", "self": "s", "url": "***", "huge": str(2**70), "many": "[1]"}
    assert raised.value.fields == expected
    assert raised.value.code == "some.code"


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("hunter2"),
        CellNotTargeted("hunter2"),
        CellwayError("some.code", "hunter2"),
        Secretive("some.code", "hunter2", password="hunter2"),
        NotFound("unencodable", "hunter2 \ud800"),
    ],
)
async def test_other_errors_stay(fault: Exception) -> None:
    """Any other failure is logged with its traceback where it happened; the caller learns only that there was one."""

    def fail(request: StartBuild) -> Done:
        raise fault

    ctx = await serving(start=fail)
    with capture_logs() as logs, pytest.raises(CellwayError) as raised:
        await start_build(ctx)
    assert type(raised.value) is CellwayError
    assert raised.value.code == "internal"
    assert "hunter2" not in f"{raised.value} {raised.value.fields}"
    assert [line["log_level"] for line in logs] == ["error"]
    assert logs[0]["exc_info"]


@pytest.mark.parametrize("text", ["\ud800", "x" * 400])
async def test_answers_that_cannot_be_sent(text: str) -> None:
    """An answer that is too large, or holds what cannot be written, is a failure of its handler."""

    async def report(ctx: RequestContext, request: Report) -> Report:
        return Report(text=text, number=1)

    transport, handlers = memory(), Handlers()
    handlers.on_call(REPORT, report)
    await serve(transport, CONDUCTOR, handlers, Limits(message_bytes=300))
    ctx, request = context(transport), Report(text="", number=1)
    with capture_logs() as logs, pytest.raises(CellwayError) as raised:
        await call(ctx, REPORT, request, address=CONDUCTOR, timeout_seconds=60)
    assert raised.value.code == "internal"
    assert [line["event"] for line in logs] == ["handler_failed"]


@pytest.mark.parametrize("report", [Report(text="\ud800", number=1), Report(text="", number=2**70)])
async def test_requests_that_cannot_be_sent(report: Report) -> None:
    """A request with a value that cannot be written is the caller's error, and nothing is sent."""
    ctx = await serving(start=accept)
    with pytest.raises(Invalid) as refusal:
        await call(ctx, REPORT, report, address=CONDUCTOR, timeout_seconds=60)
    assert refusal.value.code == "message.unencodable"


# ---- hostile input ---------------------------------------------------------------------------------------------

DEEP = b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0"
HOSTILE = {
    "empty": (b"", "message.malformed"),
    "not MessagePack": (b"GET / HTTP/1.1\r\nhunter2", "message.malformed"),
    "another shape": (msgspec.msgpack.encode(["hunter2"]), "message.malformed"),
    "something after it": (envelope() + b"hunter2", "message.malformed"),
    "a length that lies": (b"\xdf\xff\xff\xff\xff\xa7hunter2", "message.malformed"),
    "nested deeply": (DEEP, "message.malformed"),
    "a context that is none": (envelope(context="hunter2"), "message.malformed"),
    "a payload that is none": (envelope(payload="hunter2"), "message.malformed"),
    "a wrong type": (envelope(payload={"host": "hunter2", "epoch": "one"}), "message.malformed"),
    "a payload nested deeply": (
        envelope(payload={}).replace(b"\xa7payload\x80", b"\xa7payload" + DEEP),
        "message.malformed",
    ),
    "broken UTF-8": (envelope(method="start_build").replace(b"host1", b"\xff\xfest1"), "message.malformed"),
    "broken UTF-8 in the context": (envelope().replace(b"member", b"mem\xffer"), "message.malformed"),
    "a NUL": (envelope().replace(b"host1", b"host\0"), "message.malformed"),
    "a NUL in the context": (envelope().replace(b"member", b"membe\0"), "message.malformed"),
    "a NUL in a list": (
        envelope(method="report", payload={"text": "", "number": 1, "items": ["\0"]}),
        "message.malformed",
    ),
    "a NUL in a key": (
        envelope(method="report", payload={"text": "", "number": 1, "labels": {"\0": None}}),
        "message.malformed",
    ),
    "a version to come": (envelope(version=VERSION + 1, context=0), "message.unknown_version"),
    "an unknown method": (envelope(method="hunter2"), "message.unknown_method"),
}


@pytest.mark.parametrize(("message", "code"), HOSTILE.values(), ids=HOSTILE.keys())
async def test_hostile_messages(message: bytes, code: str) -> None:
    """A message that makes no sense is refused with a reason, logged without its content, and the consumer goes on."""
    ctx = await serving(start=accept)
    with capture_logs() as logs:
        reply = await raw(ctx, message)
    assert (reply["type"], reply["kind"], reply["code"]) == ("error", "Invalid", code)
    assert logs == [
        {
            "event": "message_refused",
            "log_level": "warning",
            "address": CONDUCTOR,
            "code": code,
            "bytes": len(message),
        }
    ]
    assert "hunter2" not in str(reply)
    assert await start_build(ctx) == Done(accepted=True)


def test_numbers_are_bounded() -> None:
    """No method carries a number without bounds: each fits into a column of a database."""
    for kind in vars(calls).values():
        if isinstance(kind, type) and issubclass(kind, Payload):
            for name, annotation in get_type_hints(kind, include_extras=True).items():
                assert not {int, float} & {annotation, *get_args(annotation)} or get_origin(annotation) is Annotated, (
                    name
                )


@pytest.mark.parametrize("number", [-1, 2**31, 2**64 - 1, True, 0.5])
def test_numbers_out_of_bounds(number: float) -> None:
    """A payload with such a number is refused by its decoder."""
    fields = {"host": "h", "epoch": number, "instance_uuid": "u", "attempt": 1}
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=StartBuild)


async def test_too_large_for_the_receiver() -> None:
    """A receiver keeps its own limit, whatever the sender's queue lets through."""
    handlers, transport = Handlers(), memory()
    await serve(transport, CONDUCTOR, handlers, Limits(message_bytes=10))
    reply = await raw(context(transport), b"x" * 11)
    assert (reply["kind"], reply["code"]) == ("Invalid", "message.too_large")


@EXAMPLES
@given(message=st.binary())
async def test_random_messages(message: bytes) -> None:
    """No bytes at all make a consumer raise: they are answered, as refused."""
    ctx = await serving(start=accept)
    with capture_logs() as logs:
        assert (await raw(ctx, message))["kind"] == "Invalid"
    assert [line["event"] for line in logs] == ["message_refused"]


@EXAMPLES
@given(where=st.integers(0, len(envelope()) - 1), byte=st.integers(0, 255), cut=st.booleans())
async def test_damaged_messages(where: int, byte: int, cut: bool) -> None:
    """A good message with one byte changed, or cut short there, is carried out or refused, and nothing else."""
    message = envelope()
    damaged = message[:where] if cut else message[:where] + bytes([byte]) + message[where + 1 :]
    ctx = await serving(start=accept)
    with capture_logs() as logs:
        reply = await raw(ctx, damaged)
    assert reply["type"] == "result" or reply["kind"] == "Invalid"
    assert [line["event"] for line in logs] == ["message_refused"] * (reply["type"] == "error")


@EXAMPLES
@given(
    answer=st.binary()
    | st.just(DEEP)
    | st.builds(
        lambda kind, fields: msgspec.msgpack.encode(
            {"type": "error", "kind": kind, "code": "c", "message": "m", "fields": fields}
        ),
        st.sampled_from(["Invalid", "CellNotTargeted", "SystemExit", "object", ""]),
        st.dictionaries(st.text(), st.none() | st.integers(0, 9) | st.text() | st.lists(st.text())),
    )
)
async def test_hostile_answers(answer: bytes) -> None:
    """Whatever an answer holds, its caller gets an error of ours."""

    async def deliver(message: bytes) -> bytes:
        return answer

    transport = memory()
    await transport.consume(CONDUCTOR, deliver)
    with capture_logs(), pytest.raises(CellwayError) as raised:
        await start_build(context(transport))
    assert type(raised.value) in {CellwayError, Invalid}
