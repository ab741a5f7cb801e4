"""The Compute API: the route table, and what happens to every request before and after its handler.

`build` returns the ASGI application that `app.py` mounts under `/compute`. The door stands here: limits on headers,
body and receiving time; the token decides who asks; nothing is decided on the request's own address.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import structlog
from starlette.datastructures import QueryParams
from starlette.routing import Route as PathRoute
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from cellway.compute.aggregates import AggregateApi
from cellway.compute.api import ComputeApi
from cellway.compute.host_api import HostApi
from cellway.compute.limits import Quotas
from cellway.compute.usage import UsageApi
from cellway.config import Limits
from cellway.context import Clock, RequestContext
from cellway.db.engines import Database
from cellway.db.transaction import ApiTx
from cellway.errors import CellwayError, Invalid, NotFound
from cellway.http import (
    actions,
    aggregates,
    faults,
    flavors,
    hypervisors,
    keypairs,
    limits,
    metadata,
    microversions,
    quotas,
    server_groups,
    servers,
    services,
    tags,
    tenant_usage,
    versions,
    zones,
)
from cellway.http.policy import Policy, Target
from cellway.http.routes import Route
from cellway.http.wire import Answer, Call
from cellway.ids import IdSource, ProjectId, RequestId, UserId
from cellway.outside import ProjectDirectory, TokenVerifier

log = structlog.get_logger()

Asgi: TypeAlias = ASGIApp
"""An ASGI application, for those who may not know the library."""

ROUTES: tuple[Route, ...] = (
    *servers.ROUTES,
    *metadata.ROUTES,
    *tags.ROUTES,
    *actions.ROUTES,
    *flavors.ROUTES,
    *keypairs.ROUTES,
    *services.ROUTES,
    *hypervisors.ROUTES,
    *zones.ROUTES,
    *limits.ROUTES,
    *quotas.ROUTES,
    *aggregates.ROUTES,
    *server_groups.ROUTES,
    *tenant_usage.ROUTES,
)
"""Every call that is served under `/v2.1`. The first row that fits path, method and microversion answers."""


@dataclass(frozen=True, slots=True)
class Services:
    """What handlers answer with."""

    compute: ComputeApi
    quotas: Quotas
    projects: ProjectDirectory
    hosts: HostApi
    aggregates: AggregateApi
    usage: UsageApi
    api: Database[ApiTx]
    policy: Policy
    limits: Limits
    clock: Clock
    ids: IdSource
    compute_url: str
    """The public address of `/v2.1`, without a slash at the end."""
    identity_url: str

    @property
    def bookmark_url(self) -> str:
        """The public address without the version."""
        return self.compute_url.removesuffix("/v2.1")


PREFIX = "/compute"
_JSON = {"application/json", "application/vnd.openstack.compute+json", ""}
_NOBODY = RequestContext(user_id=UserId(""), project_id=ProjectId(""), request_id=RequestId(""))


def build(services: Services, verifier: TokenVerifier) -> Asgi:
    """Return the Compute API, which answers the full paths under `/compute`."""
    by_path: dict[str, list[Route]] = {}
    for route in ROUTES:
        by_path.setdefault(route.path, []).append(route)
    pages = [
        PathRoute(PREFIX + path, _Endpoint((Route("GET", path, handler, ""),), services, None))
        for path, handler in versions.PAGES.items()
    ]
    calls = [
        PathRoute(PREFIX + base + path, _Endpoint(rows, services, verifier))
        for base in ("/v2.1", "/v2.1/{project_id}")
        for path, rows in by_path.items()
    ]
    return Router([*calls, *pages], redirect_slashes=False, default=_Endpoint((), services, verifier))


def one_port(shells: Mapping[str, ASGIApp], check_ready: Callable[[], Awaitable[None]]) -> Asgi:
    """Return the application that serves every shell by the first part of the path, and tells whether it is well.

    `/healthz` says that the process runs, `/readyz` that it can work: `check_ready` raises a CellwayError when not.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        first = path[: path.find("/", 1)] if path.find("/", 1) > 0 else path
        if path in ("/healthz", "/readyz"):
            await _send(send, await _health(path, check_ready), None, None)
        else:
            # An address of no shell is refused by the compute API, in its form and with a request id.
            await shells.get(first, shells[PREFIX])(scope, receive, send)

    return app


async def _health(path: str, check_ready: Callable[[], Awaitable[None]]) -> Answer:
    if path == "/readyz":
        try:
            await check_ready()
        except CellwayError as error:
            return Answer(503, faults.fault(503, error.message), _RETRY)
    return Answer(200, b'{"status":"ok"}')


_RETRY = (("Retry-After", str(faults.RETRY_AFTER_SECONDS)),)


class _Endpoint:
    """Answers one path: negotiates, authenticates, checks policy, runs the handler, and writes what it says."""

    def __init__(self, rows: Sequence[Route], services: Services, verifier: TokenVerifier | None) -> None:
        self._rows = rows
        self._services = services
        self._verifier = verifier

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = RequestId(f"req-{self._services.ids.uuid()}")
        version: int | None = None
        try:
            headers = _headers(scope, self._services.limits)
            version = microversions.negotiate(
                headers.get(b"openstack-api-version"), headers.get(b"x-openstack-nova-api-version")
            )
            answer = await self._answer(scope, receive, headers, version, request_id)
        except CellwayError as error:
            answer = _refusal(error)
        except Exception:
            log.exception("request_failed", request_id=request_id, method=scope["method"])
            answer = Answer(500, faults.fault(500, "Unexpected API Error. The request id says where it is logged."))
        await _send(send, answer, version, request_id)

    async def _answer(
        self, scope: Scope, receive: Receive, headers: dict[bytes, str], version: int, request_id: RequestId
    ) -> Answer:
        context = _NOBODY
        if self._verifier is not None:
            token = headers.get(b"x-auth-token")
            identity = await self._verifier.verify(token) if token else None
            if identity is None:
                challenge = f'Keystone uri="{self._services.identity_url}"'
                return Answer(401, faults.unauthorized(), (("WWW-Authenticate", challenge),))
            context = RequestContext(
                user_id=identity.user_id, project_id=identity.project_id, request_id=request_id, roles=identity.roles
            )
        path: dict[str, str] = scope.get("path_params", {})
        if path.pop("project_id", context.project_id) != context.project_id:
            raise Invalid("request.wrong_project", "Malformed request URL: its project is not the token's")
        row = _row(self._rows, scope["method"], version)
        if row.rule:
            self._services.policy.require(row.rule, context, _OWN)
        body = await _receive(receive, headers, self._services.limits)
        if body and headers.get(b"content-type", "").partition(";")[0].strip().lower() not in _JSON:
            raise faults.WrongMediaType("request.media_type", "Unsupported Content-Type: send application/json")
        return await row.handler(Call(context, version, row.rule, path, _query(scope), body, self._services))


_OWN = Target(project_id=None, user_id=None)
_EMPTY_QUERY = QueryParams()


def _headers(scope: Scope, limits: Limits) -> dict[bytes, str]:
    """Return the request's headers, after checking what of the request has arrived. Raises: TooLarge, Invalid."""
    raw: list[tuple[bytes, bytes]] = scope["headers"]
    query: bytes = scope["query_string"]
    if len(scope["path"]) + len(query) + sum(map(len, chain.from_iterable(raw))) > limits.header_bytes:
        raise faults.TooLarge("request.too_large", f"Request headers over {limits.header_bytes} bytes are not taken")
    if "\x00" in scope["path"] or b"%00" in query or b"\x00" in query:
        raise Invalid("request.nul", "The request's address holds a NUL character")
    return {name: value.decode("latin-1") for name, value in raw}


def _query(scope: Scope) -> QueryParams:
    return QueryParams(scope["query_string"]) if scope["query_string"] else _EMPTY_QUERY


async def _receive(receive: Receive, headers: dict[bytes, str], limits: Limits) -> bytes:
    """Return the request body. Raises: TooLarge, TooSlow, Invalid when the client went away."""
    length = headers.get(b"content-length", "")
    if length in ("", "0") and b"transfer-encoding" not in headers:
        return b""
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise _too_large(limits)
    received = bytearray()
    try:
        async with asyncio.timeout(limits.receive_seconds):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Invalid("request.cut", "The request ended before its body did")
                received += message.get("body", b"")
                if len(received) > limits.body_bytes:
                    raise _too_large(limits)
                more = message.get("more_body", False)
    except TimeoutError:
        raise faults.TooSlow("request.too_slow", "The request body did not arrive in time") from None
    return bytes(received)


def _too_large(limits: Limits) -> faults.TooLarge:
    return faults.TooLarge("request.too_large", f"Request bodies over {limits.body_bytes} bytes are not taken")


def _row(rows: Sequence[Route], method: str, version: int) -> Route:
    """Return the row that fits. Raises: NotFound for an unknown path or another version's call; WrongMethod."""
    for row in rows:
        if row.method == method and row.since <= version and (row.until is None or version <= row.until):
            return row
    if rows and all(row.method != method for row in rows):
        allowed = ", ".join(sorted({row.method for row in rows}))
        raise faults.WrongMethod("request.wrong_method", f"{method} is not possible here, but {allowed}", allow=allowed)
    raise NotFound("request.no_such_call", "The resource could not be found.")


def _refusal(error: CellwayError) -> Answer:
    status = faults.status_of(error)
    headers: tuple[tuple[str, str], ...] = _RETRY if status == 503 else ()
    if status == 405:
        headers = (("Allow", str(error.fields["allow"])),)
    if status in (500, 503):
        log.warning("request_refused", code=error.code, reason=error.message)
    return Answer(status, faults.fault(status, error.message), headers)


_SPOKEN = {
    version: (
        (b"openstack-api-version", b"compute " + microversions.text(version).encode()),
        (b"x-openstack-nova-api-version", microversions.text(version).encode()),
        (b"vary", b"OpenStack-API-Version, X-OpenStack-Nova-API-Version"),
    )
    for version in range(microversions.OLDEST, microversions.LATEST + 1)
}
"""The headers that say which microversion was spoken."""


async def _send(send: Send, answer: Answer, version: int | None, request_id: str | None) -> None:
    headers = [(b"content-length", b"%d" % len(answer.body))]
    if answer.body:
        headers.append((b"content-type", b"application/json"))
    if request_id is not None:
        shown = request_id.encode()
        headers += (b"x-openstack-request-id", shown), (b"x-compute-request-id", shown)
    if version is not None:
        headers += _SPOKEN[version]
    headers += [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in answer.headers]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})
