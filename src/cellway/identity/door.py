"""What every request and answer of the identity shell passes: limits, decoding, and Keystone's error shape.

Used by the handlers in `keystone.py` and `images.py`, and wrapped around them by `app.py`. It decides nothing
about users or images.
"""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cellway.config import Limits
from cellway.errors import CellwayError, Unavailable
from cellway.identity.tokens import Tokens, Verified
from cellway.ids import IdSource

BodyT = TypeVar("BodyT", bound=msgspec.Struct)

UNAUTHORIZED = "The request you have made requires authentication."


class Door:
    """Refuses oversized and malformed requests before `app` sees them, and gives every answer its request id."""

    def __init__(self, app: ASGIApp, *, limits: Limits, ids: IdSource) -> None:
        self._app = app
        self._header_bytes = limits.header_bytes
        self._ids = ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req-{self._ids.uuid()}".encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"x-openstack-request-id", request_id),
                    (b"vary", b"X-Auth-Token"),
                ]
            await send(message)

        query: bytes = scope["query_string"]
        received = len(scope["path"]) + len(query) + sum(len(name) + len(value) for name, value in scope["headers"])
        if received > self._header_bytes:
            await fault(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The request's headers are too large.")(
                scope, receive, send_with_id
            )
        elif "\x00" in scope["path"] or b"%00" in query or b"\x00" in query:
            await fault(HTTPStatus.BAD_REQUEST, "A null character is not allowed.")(scope, receive, send_with_id)
        else:
            await self._app(scope, receive, send_with_id)


def answer(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return `body` as a JSON answer."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def fault(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error in Keystone's shape."""
    body = {"error": {"code": int(status), "message": message, "title": HTTPStatus(status).phrase}}
    return answer(body, status, headers)


async def decode(request: Request, kind: type[BodyT], limits: Limits) -> BodyT:
    """Receive the request's body and decode it as `kind`.

    Raises: HTTPException 400, 408 or 413.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(limits.receive_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise HTTPException(413, f"The body may have at most {limits.body_bytes} bytes.")
    except TimeoutError as error:
        raise HTTPException(408, "The request was not received in time.") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "The request ended early.") from error
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        # It names a field, which may be as long as the body.
        raise HTTPException(400, f"{str(error)[:300]}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, "The body is not a valid JSON document.") from error


class Guard:
    """Finds out who asks."""

    def __init__(self, tokens: Tokens, identity_url: str) -> None:
        self._tokens = tokens
        self._challenge = {"WWW-Authenticate": f'Keystone uri="{identity_url}"'}

    def caller(self, request: Request) -> Verified:
        """Return whoever holds the request's X-Auth-Token.

        Raises: HTTPException 401; Unavailable.
        """
        verified = self._tokens.inspect(request.headers.get("x-auth-token", ""))
        if verified is None:
            raise self.refusal()
        return verified

    def refusal(self, message: str = UNAUTHORIZED) -> HTTPException:
        """Return the 401 that says where tokens are to be had."""
        return HTTPException(401, message, self._challenge)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer a refusal of the router or of a handler."""
    assert isinstance(error, HTTPException)
    return fault(error.status_code, error.detail, error.headers)


async def on_cellway_error(request: Request, error: Exception) -> Response:
    """Answer an error of the store: the handlers refuse everything else themselves."""
    assert isinstance(error, CellwayError)
    if isinstance(error, Unavailable):
        # Its message may name a file of this machine.
        return fault(503, "The identity service is not available; try again later.", {"Retry-After": "1"})
    return fault(400, error.message)


async def on_exception(request: Request, error: Exception) -> Response:
    """Answer a mistake of ours without a word of it; Starlette raises it again, so the server logs it."""
    return fault(500, "An unexpected error prevented the server from fulfilling your request.")
