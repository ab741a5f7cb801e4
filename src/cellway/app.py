"""The composition root: one `Application` builds everything once, owns it, and closes it in reverse order.

`up`, the separate processes, the tests and the command line all call `open_application`. Nothing else makes
databases, transports, loops or shells.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from cellway import agent as agent_shell
from cellway import identity as identity_shell
from cellway.agent import Agent
from cellway.cells import mappings
from cellway.cells.registry import Cell, Cells, Templates
from cellway.cells.target import Target, target_cell
from cellway.compute.aggregates import AggregateApi
from cellway.compute.api import ComputeApi
from cellway.compute.build import Builder
from cellway.compute.conductor import Conductor
from cellway.compute.delete import Deleter
from cellway.compute.fleet import Fleet
from cellway.compute.host_api import HostApi
from cellway.compute.limits import Quotas
from cellway.compute.usage import UsageApi
from cellway.compute.watch import Watch
from cellway.config import AgentSection, Config, Secret
from cellway.context import Clock, SystemClock, service_context
from cellway.db.engines import API, Databases
from cellway.db.schema import Tree, status
from cellway.db.transaction import ApiTx, CellTx
from cellway.errors import Invalid, Unavailable
from cellway.http import app as http_shell
from cellway.http.policy import Policy
from cellway.identity import BuiltinIdentity
from cellway.ids import IdSource, RandomIds, RequestId
from cellway.operations.embedded import DataFolder, Layout, cell_names, host_names
from cellway.rpc.transport import MemoryBrokers, Transports

log = structlog.get_logger()


class Application:
    """Everything that a process of Cellway may run. `open_application` makes it; what is not started costs nothing."""

    def __init__(self, config: Config, *, clock: Clock, ids: IdSource, dice: random.Random) -> None:
        self.config = config
        self.clock = clock
        self.ids = ids
        limits = config.limits
        self.databases = Databases(config.api_database.connection, limits=limits, clock=clock)
        self.transports = Transports(MemoryBrokers(), limits, clock)
        self.cells = Cells(
            self.databases,
            self.transports,
            limits=limits,
            clock=clock,
            templates=Templates(database=config.database.connection, transport=config.default.transport_url),
        )
        self.fleet = Fleet(
            self.cells, limits=limits, clock=clock, default_zone=config.default.default_availability_zone
        )
        self.watch = Watch(self.cells, clock=clock)
        self.builder = Builder(self.cells, self.fleet, self.watch, limits=limits, clock=clock, dice=dice)
        self.deleter = Deleter(self.cells, self.fleet, self.watch, self.builder, limits=limits)
        self.quotas = Quotas(self.cells, config.quota, config=limits, clock=clock)
        self.hosts = HostApi(self.cells, self.fleet)
        self.conductors: list[Conductor] = []
        self.agents: dict[str, Agent] = {}
        self._context = service_context(RequestId(f"req-{ids.uuid()}"))
        self._loops: list[asyncio.Task[None]] = []

    # ---- what a process may serve

    async def start_cells(self) -> None:
        """Read the cells and their hosts, and follow both from now on. The API and the builder need this.

        Raises: Unavailable, with nothing begun, when the API database does not answer or its schema is too old;
        Conflict when it is a later release's.
        """
        await self.databases.on(API).read(_check_schema, Tree.API)
        await self.cells.refresh()
        await self.fleet.sweep(self._context)
        await self.quotas.learn(self._context)
        self._loop("cells", self.cells.watch())
        self._loop("fleet", self.fleet.watch(self._context))
        self._loop("quotas", self.quotas.watch(self._context))

    async def check_api(self) -> None:
        """Ask whether the API database answers and the cells are known. Raises: Unavailable."""
        await self.databases.on(API).read(lambda _tx: self.cells.snapshot)

    async def check_cell(self, cell: Target) -> None:
        """Ask a cell's database whether it may be worked with.

        Raises: Unavailable when it does not answer or its schema is too old; Conflict when it is a later release's.
        """
        with target_cell(self._context, cell, self.databases, self.transports) as cctx:
            await self.databases.on(cctx).read(_check_schema, Tree.CELL)

    async def start_conductor(self, cell: Callable[[], Target]) -> None:
        """Serve one cell's agents; `cell` gives it as it is now.

        Raises: Conflict when another conductor does; Unavailable when the queue does not answer.
        """
        conductor = Conductor(cell, self.databases, self.transports, limits=self.config.limits, ids=self.ids)
        await conductor.start()
        self.conductors.append(conductor)

    async def start_agent(
        self, host: str, transport_url: Secret, settings: AgentSection, *, journal: Path | None = None
    ) -> Agent:
        """Run a simulated host on one cell's queue.

        Raises: Conflict when an agent of that host listens already; Unavailable when the queue does not answer.
        """
        transport = self.transports.lease(transport_url)
        try:
            agent = agent_shell.build(
                host,
                transport,
                settings,
                limits=self.config.limits,
                clock=self.clock,
                ids=self.ids,
                journal=journal,
            )
            await agent.start()
        except BaseException:
            self.transports.release(transport)
            raise
        self.agents[host] = agent
        return agent

    def start_builder(self) -> None:
        """Carry out accepted builds and deletions."""
        self._loop("builder", self.builder.run())
        self._loop("deleter", self.deleter.run())

    async def start_embedded(self, folder: DataFolder, layout: Layout) -> None:
        """Run every conductor and simulated host of a data folder. Call after `prepare`."""
        await self.cells.refresh()
        by_queue = {cell.transport_url: cell.id for cell in self.cells.snapshot.with_hosts}
        for name in cell_names(layout.cells):
            # By its queue: the name is the operator's to change.
            cell_id = by_queue[folder.transport(name)]
            await self.start_conductor(partial(self._cell, cell_id))
            for host in host_names(name, layout.hosts_per_cell):
                await self.start_agent(host, folder.transport(name), self.config.agent, journal=folder.journal(host))
        await self.start_cells()

    def open_identity(self) -> BuiltinIdentity:
        """Open the built-in identity and image services. Raises: Invalid when they are not configured or damaged."""
        if not self.config.identity.users_file:
            raise Invalid("identity.not_configured", "[identity] users_file is not set")
        base = self.public_endpoint
        return identity_shell.build(
            Path(self.config.identity.users_file),
            identity_url=f"{base}/identity",
            compute_url=f"{base}/compute/v2.1",
            image_url=f"{base}/image",
            limits=self.config.limits,
            clock=self.clock,
            ids=self.ids,
        )

    def open_port(self) -> http_shell.Asgi:
        """Return the whole port with the built-in identity, and write its `clouds.yaml` if one is configured.

        Raises: Invalid, NotFound, Unavailable.
        """
        identity = self.open_identity()
        if self.config.identity.clouds_file:
            identity.write_clouds(Path(self.config.identity.clouds_file))
        return self.open_http(identity)

    def open_http(self, identity: BuiltinIdentity) -> http_shell.Asgi:
        """Return the whole port: compute, identity and images."""
        compute = http_shell.build(self.open_services(identity), identity.tokens)
        return http_shell.one_port(
            {"/compute": compute, "/identity": identity.app, "/image": identity.app}, self.check_api
        )

    def open_services(self, identity: BuiltinIdentity) -> http_shell.Services:
        """Return what the compute API answers with."""
        return http_shell.Services(
            compute=self.open_compute(identity),
            quotas=self.quotas,
            projects=identity.store,
            hosts=self.hosts,
            aggregates=AggregateApi(self.cells, self.fleet, ids=self.ids),
            usage=UsageApi(self.cells),
            api=self.databases.on(API),
            policy=Policy.load(Path(self.config.api.policy_file) if self.config.api.policy_file else None),
            limits=self.config.limits,
            clock=self.clock,
            ids=self.ids,
            compute_url=f"{self.public_endpoint}/compute/v2.1",
            identity_url=f"{self.public_endpoint}/identity",
        )

    def open_compute(self, identity: BuiltinIdentity) -> ComputeApi:
        """Return the verbs on servers; new work wakes this process's builder, if it runs one."""
        return ComputeApi(
            self.cells,
            self.fleet,
            identity.images,
            self.quotas,
            limits=self.config.limits,
            clock=self.clock,
            ids=self.ids,
            accepted=self.builder.wake,
            deleted=self._deleted,
        )

    async def count_servers(self) -> int:
        """Return how many servers there are, wherever they are."""
        return await self.databases.on(API).read(mappings.count_live_instances)

    @property
    def public_endpoint(self) -> str:
        """The address that clients use, without a slash at the end."""
        api = self.config.api
        host = f"[{api.listen}]" if ":" in api.listen else api.listen
        return api.public_endpoint.rstrip("/") or f"http://{host}:{api.port}"

    def _cell(self, cell_id: int) -> Cell:
        return self.cells.snapshot.by_id[cell_id]

    def _deleted(self, uuid: str) -> None:
        self.builder.cancel(uuid)
        self.deleter.wake()

    def _loop(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_ended)
        self._loops.append(task)

    async def aclose(self) -> None:
        """Stop what was started, the last first; builds in hand get the grace of one RPC to finish."""
        for task in self._loops:
            if task.get_name() in ("builder", "deleter"):
                task.cancel()
        await self.builder.aclose(self.config.limits.rpc_timeout_seconds)
        await self.deleter.aclose()
        await self.watch.aclose()
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await asyncio.gather(*(agent.aclose() for agent in self.agents.values()))
        await asyncio.gather(*(conductor.aclose() for conductor in self.conductors))
        await self.transports.aclose()
        await self.databases.aclose()


def _check_schema(tx: ApiTx | CellTx, tree: Tree) -> None:
    if status(tx.connection, tree).pending:
        raise Unavailable(
            "schema.behind", f"The {tree.value} database has no schema of this release yet: cellway db sync"
        )


def _ended(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("loop_died", loop=task.get_name(), exc_info=error)


@asynccontextmanager
async def open_application(
    config: Config,
    *,
    clock: Clock | None = None,
    ids: IdSource | None = None,
    dice: random.Random | None = None,
) -> AsyncIterator[Application]:
    """Open an application for the length of the block. Nothing runs in it until it is started."""
    application = Application(
        config, clock=clock or SystemClock(), ids=ids or RandomIds(), dice=dice or random.Random()
    )
    try:
        yield application
    finally:
        await application.aclose()
