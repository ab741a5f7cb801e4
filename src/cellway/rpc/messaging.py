"""Calls and casts over a transport: envelopes, contexts and errors on the wire, and dispatch (seed 001).

Verbs, agents and conductors use `call`, `cast` and `serve`; the methods are in `calls.py`. Both senders use the
transport in the context's `mq_connection` and no other. A message is MessagePack of a versioned envelope, never a
pickle. It holds who asks, and nothing about connections. How long a call is worth beginning is told to the transport
alone (`transport.py`). What arrives is hostile until decoded: it is refused with a log line that holds none of it.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

import msgspec
import structlog

from cellway.config import Limits
from cellway.context import Consumer, RequestContext, Transport, WireContext
from cellway.errors import (
    CellHasNoQueue,
    CellNotTargeted,
    CellUnavailable,
    CellwayError,
    Conflict,
    DeadlineExceeded,
    Forbidden,
    HostUnreachable,
    Invalid,
    NotFound,
    OutcomeUnknown,
    OverQuota,
    Unavailable,
)
from cellway.rpc.calls import CallMethod, CastMethod, ReplyT, RequestT

log = structlog.get_logger()

VERSION: Final = 1
"""The form of an envelope. Raise it when an older receiver would misread a newer message: it refuses it then."""

Simple = str | int | float | bool | None

_TRAVELLERS: Final[Mapping[str, type[CellwayError]]] = {
    kind.__name__: kind
    for kind in (
        CellHasNoQueue,
        CellUnavailable,
        Conflict,
        DeadlineExceeded,
        Forbidden,
        HostUnreachable,
        Invalid,
        NotFound,
        OutcomeUnknown,
        OverQuota,
        Unavailable,
    )
}
"""The errors that cross a queue as themselves. Any other is a fault of the side it happened on, for its log."""


class _Versioned(msgspec.Struct, frozen=True):
    """What every version of the envelope has."""

    version: int


class _Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """A message: which method, for whom, with what."""

    version: int = VERSION
    method: str
    context: WireContext
    payload: msgspec.Raw


class _Result(msgspec.Struct, frozen=True, tag="result"):
    """The answer of a method."""

    payload: msgspec.Raw


class _Failure(msgspec.Struct, frozen=True, tag="error"):
    """The error of a method; `kind` is a class name in `_TRAVELLERS`."""

    kind: str
    code: str
    message: str
    fields: dict[str, Simple]


_encode = msgspec.msgpack.Encoder().encode
_decode_version = msgspec.msgpack.Decoder(_Versioned).decode
_decode_envelope = msgspec.msgpack.Decoder(_Envelope).decode
_decode_reply = msgspec.msgpack.Decoder(_Result | _Failure).decode
_UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_INTERNAL: Final = _encode(_Failure("CellwayError", "internal", "", {}))
_UNENCODABLE = (msgspec.MsgspecError, UnicodeEncodeError, OverflowError, RecursionError, TypeError)


# ---- sending ---------------------------------------------------------------------------------------------------


async def call(
    ctx: RequestContext,
    method: CallMethod[RequestT, ReplyT],
    request: RequestT,
    *,
    address: str,
    timeout_seconds: float,
) -> ReplyT:
    """Send `request` to the consumer of `address` on the context's queue and return its answer.

    Raises: CellNotTargeted; CellHasNoQueue; HostUnreachable when nobody consumes the address; DeadlineExceeded when no
    answer came in time; Invalid for a request that cannot be sent; Unavailable; what the method raises, when its class
    is one that travels; a plain CellwayError with the code "internal" for any other failure over there.
    """
    transport = _transport(ctx, "A call")
    message = _seal(ctx, method.name, request)
    answer = await transport.request(address, message, timeout_seconds=timeout_seconds)
    try:
        reply = _decode_reply(answer)
        if isinstance(reply, _Result):
            return msgspec.msgpack.decode(reply.payload, type=method.reply)
    except _UNDECODABLE as error:
        log.error("reply_refused", method=method.name, address=address, bytes=len(answer))
        raise CellwayError("internal", f"The answer to {method.name} cannot be understood") from error
    raise _unpack(reply, method.name)


async def cast(
    ctx: RequestContext,
    method: CastMethod[RequestT],
    request: RequestT,
    *,
    address: str,
    timeout_seconds: float,
) -> None:
    """Hand `request` to the context's queue for `address`; return once the queue has it.

    Raises: CellNotTargeted; CellHasNoQueue; HostUnreachable when nobody consumes the address; Invalid for a request
    that cannot be sent; Unavailable.
    """
    transport = _transport(ctx, "A cast")
    await transport.send(address, _seal(ctx, method.name, request), timeout_seconds=timeout_seconds)


def _transport(ctx: RequestContext, what: str) -> Transport:
    if ctx.mq_connection is None:
        raise CellNotTargeted(what)
    return ctx.mq_connection


def _seal(ctx: RequestContext, method: str, request: msgspec.Struct) -> bytes:
    try:
        return _encode(_Envelope(method=method, context=ctx.to_wire(), payload=msgspec.Raw(_encode(request))))
    except _UNENCODABLE as error:
        raise Invalid("message.unencodable", f"The request for {method} holds a value that cannot be sent") from error


def _unpack(failure: _Failure, method: str) -> CellwayError:
    kind = _TRAVELLERS.get(failure.kind)
    if kind is None:
        return CellwayError("internal", f"{method} failed; the log of its host says why")
    error = kind(failure.code, failure.message)
    # Not as arguments: a field may be called `code`.
    error.fields = failure.fields
    return error


# ---- receiving -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Handler:
    """How one method is carried out."""

    decode: Callable[[msgspec.Raw], Any]
    run: Callable[[RequestContext, Any], Awaitable[Any]]
    answers: bool


class Handlers:
    """The methods that a consumer carries out."""

    def __init__(self) -> None:
        self._handlers: dict[str, _Handler] = {}

    def on_call(
        self, method: CallMethod[RequestT, ReplyT], run: Callable[[RequestContext, RequestT], Awaitable[ReplyT]]
    ) -> None:
        """Carry out `method` by `run(ctx, request)`, whose result or error is the answer.

        Raises: Conflict when the method has a handler.
        """
        self._add(method.name, _Handler(msgspec.msgpack.Decoder(method.request).decode, run, True))

    def on_cast(self, method: CastMethod[RequestT], run: Callable[[RequestContext, RequestT], Awaitable[None]]) -> None:
        """Carry out `method` by `run(ctx, request)`; an error is logged, and the transport told that the cast failed.

        Raises: Conflict when the method has a handler.
        """
        self._add(method.name, _Handler(msgspec.msgpack.Decoder(method.request).decode, run, False))

    def find(self, method: str) -> _Handler | None:
        """Return how `method` is carried out."""
        return self._handlers.get(method)

    def _add(self, name: str, handler: _Handler) -> None:
        if name in self._handlers:
            raise Conflict("handler.exists", f"The method {name} already has a handler", method=name)
        self._handlers[name] = handler


def _travels(error: Exception) -> TypeGuard[CellwayError]:
    return _TRAVELLERS.get(type(error).__name__) is type(error)


def _pack(error: CellwayError) -> bytes:
    fields = {name: _simple(value) for name, value in error.fields.items()}
    try:
        return _encode(_Failure(type(error).__name__, error.code, error.message, fields))
    except _UNENCODABLE:
        log.exception("error_unencodable", code=error.code)
        return _INTERNAL


def _simple(value: object) -> Simple:
    # MessagePack has no subclasses of str, and no integer over 64 bits.
    match value:
        case None | bool() | float():
            return value
        case int() if value.bit_length() < 64:
            return int(value)
        case _:
            return str(value)


def _pack_result(result: msgspec.Struct, limits: Limits) -> bytes:
    answer = _encode(_Result(msgspec.Raw(_encode(result))))
    if len(answer) > limits.message_bytes:
        raise OverflowError(f"an answer of {len(answer)} bytes is larger than a message may be")
    return answer


async def serve(transport: Transport, address: str, handlers: Handlers, limits: Limits) -> Consumer:
    """Become the consumer of `address`; each handler's context has `transport` as its `mq_connection`.

    Raises: Conflict when another consumer holds the address; CellHasNoQueue; Unavailable.
    """

    async def deliver(message: bytes) -> bytes | None:
        try:
            envelope, handler, request = _unseal(message, handlers, limits)
        except Invalid as refusal:
            log.warning("message_refused", address=address, code=refusal.code, bytes=len(message))
            return _pack(refusal)
        ctx = RequestContext.from_wire(envelope.context, transport)
        try:
            result = await handler.run(ctx, request)
            return _pack_result(result, limits) if handler.answers else None
        except Exception as error:
            if handler.answers and _travels(error):
                return _pack(error)
            log.exception("handler_failed", address=address, method=envelope.method, request_id=ctx.request_id)
            if handler.answers:
                return _INTERNAL
            raise

    return await transport.consume(address, deliver)


def _unseal(message: bytes, handlers: Handlers, limits: Limits) -> tuple[_Envelope, _Handler, Any]:
    """Decode a message from anywhere. Raises: Invalid, which quotes nothing of it."""
    if len(message) > limits.message_bytes:
        raise Invalid("message.too_large", f"A message may hold {limits.message_bytes} bytes")
    try:
        version = _decode_version(message).version
        if version != VERSION:
            raise Invalid("message.unknown_version", f"Version {VERSION} of messages is spoken here, not {version}")
        envelope = _decode_envelope(message)
        handler = handlers.find(envelope.method)
        if handler is None:
            raise Invalid("message.unknown_method", "The method is not one that is carried out here")
        request = handler.decode(envelope.payload)
    except _UNDECODABLE as error:
        raise Invalid("message.malformed", "The message cannot be understood") from error
    # No text of ours holds a NUL, and databases choke on it. Most messages hold no such byte at all.
    if 0 in message and (_holds_nul(envelope.context) or _holds_nul(request)):
        raise Invalid("message.malformed", "The message holds a text with a NUL character")
    return envelope, handler, request


def _holds_nul(value: object) -> bool:
    match value:
        case str():
            return "\0" in value
        case msgspec.Struct():
            return any(_holds_nul(getattr(value, name)) for name in value.__struct_fields__)
        case list() | tuple():
            return any(map(_holds_nul, value))
        case dict():
            return any(map(_holds_nul, value)) or any(map(_holds_nul, value.values()))
        case _:
            return False
