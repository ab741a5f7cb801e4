"""What is measured: each operation over a socket and inside the process, and its floor both ways.

Everything that is counted runs in this process; the client, and a database server, are others. `stage` makes the two
deployments and records what one request of each kind says and asks of the databases; `open_operations` opens what the
rounds run against.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.types import ASGIApp

from benchmarks.client import CONNECTIONS, Client, Requests, open_client
from benchmarks.floor import Replay, Transaction, empty_handlers, record
from cellway import builds
from cellway.config import AgentSection, Limits, Secret
from cellway.testing import TINY_IMAGE, Deployment, deployment
from cellway.testing import Client as InProcess

SERVERS = 100
"""Of the page that is listed."""
CELLS, HOSTS_PER_CELL = 2, 2

_AGENT = AgentSection(latency_seconds=0.0, vcpus=10_000, memory_mb=10_000_000, disk_gb=1_000_000)
_PATIENT = Limits(database_deadline_seconds=60, rpc_timeout_seconds=60, claim_seconds=120, launch_seconds=120)
"""The defaults, but for what would make a measurement fail on a machine that is busy with something else."""
_STILL = replace(_PATIENT, registry_refresh_seconds=3600, heartbeat_seconds=3600, fleet_sweep_seconds=3600)
"""Nothing happens by itself, so that what is recorded belongs to the request."""
_NEW = {"server": {"name": "measured", "flavorRef": "m1.tiny", "imageRef": TINY_IMAGE, "networks": "none"}}

_Urls = Callable[[str], Secret] | None
"""Of a deployment's databases; None for files in its folder."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a deployment is kept."""

    folder: Path
    databases: _Urls


Measured = Callable[[int], Awaitable[None]]
"""Does one thing so many times."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, what it was answered, and what it asked of the databases."""

    method: str
    path: str
    body: bytes
    status: int
    answer: bytes
    transactions: tuple[Transaction, ...]
    renewed: str = ""
    """The uuid in the transactions' parameters that must be another each time they run."""


@dataclass(frozen=True, slots=True)
class Operation:
    """A row of the table. What is None cannot be said of it."""

    name: str
    times: int
    """For each figure."""
    figures: int
    """In each round."""
    socket: Measured
    inside: Measured | None = None
    floor_socket: Measured | None = None
    floor_inside: Measured | None = None
    floor_driver: Callable[[int], Callable[[], None]] | None = None
    """Prepares so many runs of the statements, and returns what does them."""
    nova_microseconds: int | None = None


# ---- staging ---------------------------------------------------------------------------------------------------


async def stage(full: Place, accepting: Place) -> Mapping[str, Sample]:
    """Make a deployment with a page of servers, and one that only accepts; return a sample of each operation."""
    async with _deployed(full) as running:
        await running.make_flavor("m1.tiny")
        many: dict[str, Any] = {"min_count": SERVERS, "metadata": {"role": "web", "owner": "team"}, "tags": ["blue"]}
        server = await running.boot("server", **many)
        await _until_built(running)
    async with _deployed(full, limits=_STILL, builder=False) as running:
        show = await _sample(running, running.member, "GET", f"/servers/{server}")
        page = await _sample(running, running.member, "GET", f"/servers/detail?limit={SERVERS}")
        project = running.identity.store.find_project_named("demo")
        assert project is not None
        quota = await _sample(running, running.member, "GET", f"/os-quota-sets/{project.id}")
        detail = await _sample(running, running.member, "GET", f"/os-quota-sets/{project.id}/detail")
    async with _accepting(accepting, limits=_STILL) as running:
        await running.make_flavor("m1.tiny")
        create = await _sample(running, running.admin, "POST", "/servers", _NEW)
    return {"show": show, "page": page, "create": create, "quota": quota, "detail": detail}


@asynccontextmanager
async def _deployed(
    place: Place,
    *,
    limits: Limits = _PATIENT,
    builder: bool = True,
    cells: int = CELLS,
    hosts_per_cell: int = HOSTS_PER_CELL,
) -> AsyncIterator[Deployment]:
    async with deployment(
        place.folder,
        databases=place.databases,
        agent=_AGENT,
        limits=limits,
        builder=builder,
        cells=cells,
        hosts_per_cell=hosts_per_cell,
    ) as running:
        yield running


_accepting = partial(_deployed, builder=False, cells=1, hosts_per_cell=1)


async def _until_built(running: Deployment) -> None:
    async def built() -> bool:
        return not (
            running.app.builder.in_progress or await running.in_api(partial(builds.list_requests, project_id=None))
        )

    await running.until(built, seconds=120)


async def _sample(running: Deployment, client: InProcess, method: str, path: str, json: Any = None) -> Sample:
    """Send the request twice, the first to fill the caches."""
    await client.request(method, path, json)
    recorded = record(running)
    answer = await client.request(method, path, json)
    # The bare driver writes each time as another server.
    body, renewed = (b"", "") if json is None else (msgspec.json.encode(json), answer.json["server"]["id"])
    return Sample(method, client.base + path, body, answer.status, answer.body, tuple(recorded), renewed)


# ---- the rounds' operations ------------------------------------------------------------------------------------


@asynccontextmanager
async def open_operations(
    full_place: Place, accepting_place: Place, samples: Mapping[str, Sample]
) -> AsyncIterator[tuple[Operation, ...]]:
    """Open the staged deployment, another that accepts and does not build, the empty handlers and the client."""
    async with AsyncExitStack() as stack:
        full = await stack.enter_async_context(_deployed(full_place))
        accepting = await stack.enter_async_context(_accepting(accepting_place))
        client = await stack.enter_async_context(open_client())
        handlers = empty_handlers({(one.method, one.path): (one.status, one.answer) for one in samples.values()})
        ports = [await stack.enter_async_context(_served(app)) for app in (full.port, accepting.port, handlers)]
        await _until_built(full)

        def ways(sample: Sample, deployment: Deployment, user: InProcess, port: int) -> dict[str, Any]:
            replay = stack.enter_context(closing(Replay(sample.transactions)))
            return {
                "socket": partial(_over_socket, client, port, sample, user),
                "inside": partial(_inside, deployment.port, sample, user),
                "floor_socket": partial(_over_socket, client, ports[2], sample, user),
                "floor_inside": partial(_inside, handlers, sample, user),
                "floor_driver": partial(replay.prepared, renewed=sample.renewed),
            }

        async def build(times: int) -> None:
            await _over_socket(client, ports[0], samples["create"], full.admin, times)
            await _until_built(full)

        show, page, create = (samples[name] for name in ("show", "page", "create"))
        of_member = partial(ways, deployment=full, user=full.member, port=ports[0])
        yield (
            Operation("show", 48, 4, nova_microseconds=15_600, **of_member(show)),
            Operation(f"list, {SERVERS} in detail", 4, 4, nova_microseconds=275_000, **of_member(page)),
            Operation("quota show", 48, 2, **of_member(samples["quota"])),
            Operation("quota show, detail", 48, 2, **of_member(samples["detail"])),
            Operation("create, accepted", 8, 4, **ways(create, accepting, accepting.admin, ports[1])),
            Operation("create, to ACTIVE", 8, 1, nova_microseconds=500_000, socket=build),
        )
        await _check_built(full)


async def _check_built(running: Deployment) -> None:
    answer = await running.admin.get("/servers/detail")
    states = {server["status"] for server in answer.json["servers"]}
    if states != {"ACTIVE"}:
        raise RuntimeError(f"not every server that was built is ACTIVE: {states}")


class _Server(uvicorn.Server):
    """One that leaves Ctrl-C to the run, which then removes what it made."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def _served(app: ASGIApp) -> AsyncIterator[int]:
    """Serve the application as `cellway up` does, for the length of the block; give the port."""
    config = uvicorn.Config(
        app, http="httptools", lifespan="off", access_log=False, log_level="warning", timeout_keep_alive=3600
    )
    server = _Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield int(listening.getsockname()[1])
        finally:
            server.should_exit = True
            await serving


def _headers(user: InProcess) -> dict[str, str]:
    return {
        "Host": "127.0.0.1:8774",
        "User-Agent": "openstacksdk/4.22.0 keystoneauth1/5.18.1 python-requests/2.32",
        "Accept-Encoding": "gzip, deflate",
        "Accept": "application/json",
        "Connection": "keep-alive",
        "Content-Type": "application/json",
        **user.headers,
    }


async def _over_socket(client: Client, port: int, sample: Sample, user: InProcess, times: int) -> None:
    lines = [f"{sample.method} {sample.path} HTTP/1.1", *(f"{name}: {value}" for name, value in _headers(user).items())]
    await client.send(Requests(port, "\r\n".join(lines), sample.body.decode(), times, sample.status))


async def _inside(app: ASGIApp, sample: Sample, user: InProcess, times: int) -> None:
    """Call the application without a server, as many requests at once as the socket's client has connections."""
    path, _, query = sample.path.partition("?")
    sent = _headers(user) | {"Content-Length": str(len(sample.body))}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": sample.method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8774),
    }
    turns = iter(range(times))
    statuses: set[int] = set()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": sample.body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.add(message["status"])

    async def work() -> None:
        for _ in turns:
            await app(dict(scope), receive, send)

    await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
    if statuses != {sample.status}:
        raise RuntimeError(f"{sample.method} {path}: {statuses}")
