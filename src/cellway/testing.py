"""A whole deployment in one process, for our tests and for our users'.

`deployment()` gives the real thing: databases, queues, conductors, agents, the builder and the HTTP application, over a
folder of its own; nothing of ours is replaced. Requests go straight into the application, without a socket.
"""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from cellway import __version__
from cellway.app import Application, open_application
from cellway.cells.registry import Cell
from cellway.config import AgentSection, Config, Limits, QuotaSection, Secret
from cellway.context import Clock, SystemClock, service_context
from cellway.db.engines import API
from cellway.db.schema import Tree
from cellway.db.transaction import CellTx
from cellway.errors import NotFound
from cellway.http.app import Asgi
from cellway.identity import BuiltinIdentity
from cellway.ids import IdSource, RandomIds, RequestId
from cellway.operations.embedded import DataFolder, Layout, cell_names, prepare
from cellway.operations.schemas import sync

QUICK = Limits(
    registry_refresh_seconds=0.2,
    database_deadline_seconds=20.0,
    rpc_timeout_seconds=20.0,
    heartbeat_seconds=0.2,
    fleet_sweep_seconds=0.2,
    claim_seconds=3.0,
    claim_renew_seconds=1.0,
    recast_seconds=0.5,
    builder_poll_seconds=0.1,
)
"""Limits for tests: what is looked for again is looked for sooner, but nobody is given up because a machine stalls."""

NO_QUOTA = QuotaSection(instances=-1, cores=-1, ram=-1, key_pairs=-1, server_groups=-1, server_group_members=-1)
"""Nothing is refused for its number, unless a test sets limits."""

_PAUSE = threading.Event()
"""Never set: threads of a hanging database wait on it in short turns."""

BASE = "http://127.0.0.1:8774"
TINY_IMAGE = "7f3c1f52-7c1b-4c59-9d0e-5a4b3f0c7e11"
"""The image that the built-in catalogue has."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer of the application."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return msgspec.json.decode(self.body)


@dataclass(frozen=True, slots=True)
class Client:
    """Sends requests into an application, as one user, at one microversion."""

    app: Asgi
    headers: Mapping[str, str] = field(default_factory=dict)
    base: str = "/compute/v2.1"

    def at(self, microversion: str | None) -> "Client":
        """Return the same client at another microversion; None sends no header."""
        headers = {key: value for key, value in self.headers.items() if key != "OpenStack-API-Version"}
        if microversion is not None:
            headers["OpenStack-API-Version"] = f"compute {microversion}"
        return replace(self, headers=headers)

    async def request(
        self,
        method: str,
        path: str,
        json: Any = None,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send one request. `path` is below `base`, or a whole address, or starts with `//` for one from the root."""
        target = (
            urlsplit(path)
            if path.startswith("http")
            else urlsplit(path[1:] if path.startswith("//") else self.base + path)
        )
        content = body if body is not None else msgspec.json.encode(json) if json is not None else b""
        sent = {"host": "client.example", **self.headers, **(headers or {})}
        if content:
            sent = {"content-type": "application/json", "content-length": str(len(content)), **sent}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": target.path,
            "raw_path": target.path.encode(),
            "root_path": "",
            "query_string": target.query.encode(),
            "headers": [(key.lower().encode(), value.encode("latin-1")) for key, value in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8774),
        }
        answered: list[Mapping[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Any) -> None:
            answered.append(message)

        await self.app(scope, receive, send)
        start = answered[0]
        shown = {key.decode().lower(): value.decode("latin-1") for key, value in start["headers"]}
        return Response(start["status"], shown, b"".join(message.get("body", b"") for message in answered[1:]))

    async def get(self, path: str, **kwargs: Any) -> Response:
        """`GET`"""
        return await self.request("GET", path, **kwargs)

    async def post(self, path: str, json: Any = None, **kwargs: Any) -> Response:
        """`POST`"""
        return await self.request("POST", path, json, **kwargs)

    async def put(self, path: str, json: Any = None, **kwargs: Any) -> Response:
        """`PUT`"""
        return await self.request("PUT", path, json, **kwargs)

    async def delete(self, path: str, **kwargs: Any) -> Response:
        """`DELETE`"""
        return await self.request("DELETE", path, **kwargs)


class Deployment:
    """A running deployment. `admin` and `member` are clients; `app` is the `Application` inside."""

    def __init__(self, folder: DataFolder, application: Application, identity: BuiltinIdentity, port: Asgi) -> None:
        self.folder = folder
        self.app = application
        self.identity = identity
        self.port = port
        self._passwords = {"admin": "admin-password", "demo": "demo-password"}
        self.admin = Client(port)
        self.member = Client(port)

    async def sign_in(self, user: str, password: str, microversion: str | None = "2.53") -> Client:
        """Return a client with a token of the user's."""
        scope = {"identity": {"methods": ["password"], "password": {"user": _user(user, password)}}}
        answer = await Client(self.port).post("//identity/v3/auth/tokens", {"auth": scope})
        assert answer.status == 201, answer.body
        return Client(self.port, {"X-Auth-Token": answer.headers["x-subject-token"]}).at(microversion)

    async def open_clients(self) -> None:
        """Set known passwords and sign the two built-in users in."""
        self.identity.store.set_passwords(self._passwords)
        self.admin = await self.sign_in("admin", self._passwords["admin"])
        self.member = await self.sign_in("demo", self._passwords["demo"])

    async def add_user(self, name: str, project: str, role: Literal["admin", "member", "reader"]) -> Client:
        """Make a user, in an existing or new project, and sign in."""
        try:
            self.identity.store.create_project(project)
        except Exception as error:
            if "exist" not in str(error):
                raise
        self.identity.store.create_user(name, project=project, role=role, password=f"{name}-password")
        return await self.sign_in(name, f"{name}-password")

    def cell(self, name: str) -> Cell:
        """Return a cell by name. Raises: NotFound."""
        for cell in self.app.cells.snapshot.all:
            if cell.ref.name == name:
                return cell
        raise NotFound("cell.not_found", f"There is no cell {name}")

    async def in_cell(self, name: str, read: Callable[[CellTx], Any]) -> Any:
        """Run a read in one cell's database."""
        with self.targeted(name) as cctx:
            return await self.app.databases.on(cctx).read(read)

    def targeted(self, name: str) -> Any:
        """Return a context manager that targets a cell."""
        return self.app.cells.target_cell(service_context(RequestId("req-test")), self.cell(name))

    async def in_api(self, read: Callable[[Any], Any]) -> Any:
        """Run a read in the API database."""
        return await self.app.databases.on(API).read(read)

    def break_cell(self, name: str, how: Literal["refuse", "hang"]) -> None:
        """Make a cell's database refuse or hang, until `heal_cell`."""
        with self.targeted(name) as cctx:
            database = self.app.databases.on(cctx)
            outage = database.outage()

            def fault(expired: Callable[[], bool]) -> None:
                if how == "refuse":
                    raise outage
                while not expired() and database.fault is fault:
                    _PAUSE.wait(0.01)

            database.fault = fault

    def heal_cell(self, name: str) -> None:
        """Let a cell's database answer again."""
        with self.targeted(name) as cctx:
            self.app.databases.on(cctx).fault = None

    async def make_flavor(self, name: str = "m1.tiny", **changes: Any) -> str:
        """Make a flavor and return its id."""
        wanted = {"name": name, "vcpus": 1, "ram": 512, "disk": 1, "id": name} | changes
        answer = await self.admin.post("/flavors", {"flavor": wanted})
        assert answer.status == 200, answer.body
        return str(answer.json["flavor"]["id"])

    async def boot(self, name: str, client: Client | None = None, flavor: str = "m1.tiny", **more: Any) -> str:
        """Ask for a server and return its id."""
        wanted = {"name": name, "flavorRef": flavor, "imageRef": TINY_IMAGE, "networks": "none"} | more
        answer = await (client or self.member).post("/servers", {"server": wanted})
        assert answer.status == 202, answer.body
        return str(answer.json["server"]["id"])

    async def until(self, condition: Callable[[], Awaitable[Any]], seconds: float = 60.0) -> Any:
        """Wait until `condition` gives something true, and return that. Raises: TimeoutError."""
        async with asyncio.timeout(seconds):
            while not (found := await condition()):  # noqa: ASYNC110 - what is waited for is in databases
                await asyncio.sleep(0.01)
            return found

    async def until_status(self, server: str, status: str, client: Client | None = None) -> Any:
        """Wait until a server has a status (and no task), and return it."""

        async def reached() -> Any:
            answer = await (client or self.member).get(f"/servers/{server}")
            body = answer.json.get("server", {})
            return body if body.get("status") == status and body.get("OS-EXT-STS:task_state") is None else None

        return await self.until(reached)

    async def until_gone(self, server: str, client: Client | None = None) -> None:
        """Wait until a server is not found."""

        async def gone() -> bool:
            return (await (client or self.member).get(f"/servers/{server}")).status == 404

        await self.until(gone)


def _user(name: str, password: str) -> dict[str, Any]:
    return {"name": name, "domain": {"id": "default"}, "password": password}


@cache
def _empty(tree: Tree) -> bytes:
    """Return an empty database of a kind: its schema takes longer to make than everything else that a test starts."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "empty.db"
        sync("empty", Secret(f"sqlite:///{file}"), tree, limits=QUICK)
        return file.read_bytes()


def _lay_out(folder: DataFolder, cells: int) -> None:
    folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.databases is not None:
        return
    for name, tree in [("api", Tree.API), *((cell, Tree.CELL) for cell in ("cell0", *cell_names(cells)))]:
        file = folder.path / f"{name}.db"
        if not file.exists():
            file.write_bytes(_empty(tree))


@asynccontextmanager
async def deployment(
    path: Path,
    *,
    cells: int = 2,
    hosts_per_cell: int = 2,
    agent: AgentSection | None = None,
    limits: Limits = QUICK,
    clock: Clock | None = None,
    ids: IdSource | None = None,
    builder: bool = True,
    databases: Callable[[str], Secret] | None = None,
    quota: QuotaSection = NO_QUOTA,
) -> AsyncIterator[Deployment]:
    """Run a deployment in the folder `path`, which may hold one from before, for the length of the block.

    `databases` gives the URL of a database that exists already, by its name ("api", "cell0", "cell1" …), on PostgreSQL
    or MariaDB; without it they are SQLite files in the folder.
    """
    settings = agent or AgentSection(latency_seconds=0.0)
    clock, ids = clock or SystemClock(), ids or RandomIds()
    folder = DataFolder(path, databases)
    config = folder.config(Config(agent=settings, quota=quota, limits=limits), listen="127.0.0.1", port=8774)
    layout = Layout(cells, hosts_per_cell, __version__)
    _lay_out(folder, cells)
    await prepare(folder, config, layout, clock=clock, ids=ids)
    async with open_application(config, clock=clock, ids=ids, dice=random.Random(1)) as application:
        identity = application.open_identity()
        port = application.open_http(identity)
        running = Deployment(folder, application, identity, port)
        await application.start_embedded(folder, layout)
        if builder:
            application.start_builder()
        await running.open_clients()
        yield running
