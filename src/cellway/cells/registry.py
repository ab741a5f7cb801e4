"""The live set of cells: a snapshot that every process refreshes without a restart.

`Cells` is what verbs hold: it resolves stored URLs (templates, `env:` and `file:` references) once per change, hands
out targeted contexts and finds the cell of an instance. It never asks a cell anything itself.
"""

import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from cachetools import TTLCache

from cellway.cells import mappings
from cellway.cells.mappings import CellMapping, InstanceMapping
from cellway.cells.target import target_cell
from cellway.config import Limits, Secret
from cellway.context import CellContext, CellRef, Clock, RequestContext
from cellway.db.engines import API, Databases, connection_key
from cellway.errors import CellUnavailable, Invalid, NotFound, Unavailable
from cellway.ids import CELL0_UUID
from cellway.rpc.transport import Transports

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell with its URLs resolved. `problem` says why they could not be; targeting it then refuses."""

    id: int
    ref: CellRef
    disabled: bool
    database_key: str
    database_url: Secret = field(repr=False)
    transport_url: Secret = field(repr=False)
    problem: str | None = None

    @property
    def is_cell0(self) -> bool:
        """Whether this is the cell without hosts."""
        return self.ref.uuid == CELL0_UUID


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All cells at one moment."""

    by_id: Mapping[int, Cell]

    @property
    def all(self) -> tuple[Cell, ...]:
        """Every cell, cell0 included."""
        return tuple(self.by_id.values())

    @property
    def with_hosts(self) -> tuple[Cell, ...]:
        """Every cell but cell0."""
        return tuple(cell for cell in self.by_id.values() if not cell.is_cell0)

    def cell0(self) -> Cell:
        """Return cell0. Raises: NotFound when the deployment has none."""
        for cell in self.by_id.values():
            if cell.is_cell0:
                return cell
        raise NotFound("cell.no_cell0", "There is no cell0; make it with: cellway cell create cell0")


class Cells:
    """The cells of the deployment, and the way into each."""

    def __init__(
        self,
        databases: Databases,
        transports: Transports,
        *,
        limits: Limits,
        clock: Clock,
        templates: "Templates | None" = None,
    ) -> None:
        self.databases = databases
        self.transports = transports
        self.limits = limits
        self._clock = clock
        self._templates = templates or Templates()
        self._snapshot: Snapshot | None = None
        self._instances: TTLCache[str, InstanceMapping] = TTLCache(
            limits.mapping_cache_entries, limits.mapping_cache_seconds, timer=clock.monotonic
        )

    @property
    def snapshot(self) -> Snapshot:
        """The cells as last read.

        Raises: Unavailable before the first `refresh` that succeeded: no cells known is not the same as none there.
        """
        if self._snapshot is None:
            raise Unavailable("api_database.cells_unknown", "The cells have not been read yet")
        return self._snapshot

    async def refresh(self) -> bool:
        """Read the cell mappings, and what they refer to, again; tell whether anything changed.

        Raises: Unavailable when the API database does not answer; the snapshot stays as it was.
        """
        stored = await self.databases.on(API).read(mappings.list_cells)
        before, now = self._snapshot, Snapshot({cell.id: self._resolve(cell) for cell in stored})
        if now == before:
            return False
        self._snapshot = now
        log.info("cells_changed", cells=[cell.ref.name for cell in now.all])
        for cell in now.all:
            if cell.problem is not None:
                log.error("cell_misconfigured", cell=cell.ref.name, problem=cell.problem)
        for key in {cell.database_key for cell in (before.all if before else ())} - {
            cell.database_key for cell in now.all
        }:
            self.databases.retire(key)
        return True

    async def watch(self) -> None:
        """Refresh for ever; a failure is logged once per outage."""
        failing = False
        while True:
            await self._clock.sleep(self.limits.registry_refresh_seconds)
            try:
                await self.refresh()
                failing = False
            except Exception as error:
                if not failing:
                    log.warning("cells_refresh_failed", error=repr(error))
                failing = True
            self.databases.expire_idle()
            self.transports.expire_idle()

    def target_cell(self, context: RequestContext, cell: Cell) -> AbstractContextManager[CellContext]:
        """Give a new context targeted at `cell` for the length of the block (seeds 000 and 001).

        Raises: CellUnavailable when the cell's URLs cannot be resolved.
        """
        if cell.problem is not None:
            raise CellUnavailable("cell.misconfigured", f"Cell {cell.ref.name}: {cell.problem}", cell=cell.ref.name)
        return target_cell(context, cell, self.databases, self.transports)

    async def find_mapping(self, uuid: str, *, fresh: bool = False) -> InstanceMapping | None:
        """Return where an instance is, from the cache unless `fresh`. A mapping without a cell is never cached."""
        if not fresh:
            cached = self._instances.get(uuid)
            if cached is not None:
                return cached
        found = await self.databases.on(API).read(mappings.find_instance, uuid)
        self.forget_mapping(uuid)
        if found is not None and found.cell_id is not None:
            self._instances[uuid] = found
        return found

    def forget_mapping(self, uuid: str) -> None:
        """Drop a cached mapping: the instance moved, is to be deleted, or its cell says that it is not there."""
        self._instances.pop(uuid, None)

    async def cell_of(self, mapping: InstanceMapping) -> Cell:
        """Return the cell that a mapping names; one made a moment ago is looked up once.

        Raises: NotFound when the cell was deleted.
        """
        assert mapping.cell_id is not None
        cell = self.snapshot.by_id.get(mapping.cell_id)
        if cell is None:
            await self.refresh()
            cell = self.snapshot.by_id.get(mapping.cell_id)
        if cell is None:
            raise NotFound("cell.not_found", "The cell of this instance no longer exists")
        return cell

    def _resolve(self, stored: CellMapping) -> Cell:
        ref = CellRef(stored.uuid, stored.name)
        database, transport, problem = Secret(""), Secret("none:///"), None
        try:
            database = self._templates.resolve(stored.database_connection, "database")
            transport = self._templates.resolve(stored.transport_url, "transport")
        except Invalid as error:
            problem = error.message
        return Cell(
            stored.id, ref, stored.disabled, connection_key(stored.uuid, database), database, transport, problem
        )


class Templates:
    """Turns stored URLs into real ones.

    A stored URL is `env:NAME`, `file:PATH`, or a URL that may hold parts of this process's own, such as `{hostname}`;
    `{{` in it stands for the character `{`. What is put in is not looked at again.
    """

    _NAMES = ("scheme", "username", "password", "hostname", "port", "path", "query", "fragment")
    _PART = re.compile(rf"\{{(?:(\{{)|({'|'.join(_NAMES)})\}})?")

    def __init__(
        self,
        *,
        database: Secret | None = None,
        transport: Secret | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._local = {"database": database, "transport": transport}
        self._environ = environ

    def resolve(self, stored: Secret, kind: str) -> Secret:
        """Return the real URL. `kind` is `database` or `transport`: whose parts fill a template.

        Raises: Invalid naming what is missing, never the URL.
        """
        text = stored.reveal()
        if text.startswith("env:"):
            name = text.removeprefix("env:")
            if name not in self._environ:
                raise Invalid("cell.no_environment", f"its {kind} URL is in ${name}, which is not set")
            return Secret(self._environ[name])
        if text.startswith("file:"):
            path = Path(text.removeprefix("file:"))
            try:
                return Secret(path.read_text(encoding="utf-8").strip())
            except (OSError, ValueError):
                raise Invalid("cell.no_file", f"its {kind} URL is in {path}, which cannot be read") from None
        if "{" not in text:
            return stored
        return Secret(self._fill(text, kind))

    def _fill(self, text: str, kind: str) -> str:
        parts = self._parts(kind)

        def replacement(match: re.Match[str]) -> str:
            brace, name = match.groups()
            if brace is not None:
                return "{"
            if name is None:
                known = ", ".join(f"{{{name}}}" for name in self._NAMES)
                raise Invalid("cell.template", f"its {kind} URL has a {{ that begins none of {known}, nor is doubled")
            value = parts.get(name)
            if value is None:
                raise Invalid(
                    "cell.template", f"its {kind} URL needs {{{name}}}, which this process's own URL does not have"
                )
            return value

        return self._PART.sub(replacement, text)

    def _parts(self, kind: str) -> Mapping[str, str | None]:
        local = self._local[kind]
        if not local:
            return {}
        try:
            url = urlsplit(local.reveal())
            port = url.port
        except ValueError:
            # Its own message quotes the URL.
            raise Invalid("cell.template", f"this process's own {kind} URL, which fills its, is not a URL") from None
        return {
            "scheme": url.scheme,
            "username": url.username,
            "password": url.password,
            # Not `url.hostname`, which is without the brackets and capitals.
            "hostname": re.sub(r":\d*$", "", url.netloc.rpartition("@")[2]) or None,
            "port": None if port is None else str(port),
            "path": url.path.removeprefix("/"),
            "query": url.query,
            "fragment": url.fragment,
        }
