"""Limits and usage across cells (seed 003): what the nouns of `quota` cannot do alone, because they see one database.

Limits that still lie in the cells are read there, after the API database, until every cell is known to hold none: that
is remembered per cell and table, in the API database and here, and then a miss asks no cell. Usages that were never
counted are counted from the charges; cells are asked only for servers that nobody has charged yet, and a cell that does
not answer takes nothing from a usage. The HTTP shell, `compute/api.py` and the command line call this.
"""

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Concatenate, Final, ParamSpec, TypeVar

import structlog
from cachetools import LRUCache

from cellway import keypairs, migration_state, server_groups
from cellway.cells import mappings
from cellway.cells.registry import Cell, Cells
from cellway.cells.scatter import Answered, gather
from cellway.config import Limits, QuotaSection
from cellway.context import CellContext, Clock, RequestContext
from cellway.db.engines import API
from cellway.db.transaction import ApiTx, CellTx
from cellway.errors import Invalid, Unavailable
from cellway.instances import reading
from cellway.instances.reading import Size
from cellway.quota import legacy, limits, usage
from cellway.quota.legacy import Kind, Owner
from cellway.quota.limits import Allowed, Level, Older, Source
from cellway.quota.usage import COUNTED, SERVER, Charge, Recount, Uncounted, Usage

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger()

_COUNTS: Final = 5
"""Times that a usage is counted anew for one request before it is given up: something keeps spoiling it."""
_CHARGES: Final = "server_charges"
"""The name under which it is remembered that every server of a cell is charged."""
_CHUNK: Final = 1000
"""Servers that a cell is asked for at once, and reservations that one sweep returns."""

Wanted = Mapping[Level, tuple[Kind, Owner]]
Found = Mapping[Level, Mapping[str, int]]
"""Limits that one cell holds."""


class Quotas:
    """The limits and usages of all projects."""

    def __init__(self, cells: Cells, section: QuotaSection, *, config: Limits, clock: Clock) -> None:
        self.defaults = limits.defaults_of(section)
        self._cells = cells
        self._config = config
        self._clock = clock
        self._refuses = section.silent_cells == "refuse"
        self.recount: Final = Recount(section.max_age, section.until_refresh)
        self._done: set[tuple[str, str]] = set()
        self._last_found: LRUCache[tuple[str, str, str, str], Found] = LRUCache(config.mapping_cache_entries)

    # ---- deciding

    async def decide(
        self,
        context: RequestContext,
        owner: tuple[str, str],
        resources: Collection[str],
        write: Callable[[Older], Awaitable[T]],
    ) -> T:
        """Run `write`, which reserves for the owner, a (project, user); count first what it finds uncounted.

        `write` is given what limits still lie in cells, for `limits.allowed`. Raises: what it raises; Unavailable when
        cells that are needed for that do not answer.
        """
        older = await self.find_older(context, *owner, resources)
        for _ in range(_COUNTS):
            try:
                return await write(older)
            except Uncounted as error:
                await self._count(context, error)
        raise _unsettled(owner[0])

    async def take(
        self,
        context: RequestContext,
        resource: str,
        owner: tuple[str, str],
        make: Callable[Concatenate[ApiTx, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Make one of something that is counted, in the same transaction; `owner` is its (project or '', user).

        Raises: OverQuota; what `make` raises.
        """
        limit_of = owner[0] or context.project_id

        async def write(older: Older) -> T:
            def taking(tx: ApiTx) -> T:
                made = make(tx, *args, **kwargs)
                usage.take(
                    tx, *owner, {resource: 1}, lambda: limits.allowed(tx, self.defaults, limit_of, owner[1], older)
                )
                return made

            return await self._cells.databases.on(API).write_once(None, taking)

        return await self.decide(context, (limit_of, owner[1]), [resource], write)

    async def give_back(
        self,
        resource: str,
        owner: tuple[str, str],
        remove: Callable[Concatenate[ApiTx, P], None],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        """Remove one of something that is counted, in the same transaction. Raises: what `remove` raises."""

        def giving(tx: ApiTx) -> None:
            remove(tx, *args, **kwargs)
            usage.give_back(tx, *owner, resource)

        await self._cells.databases.on(API).write_once(None, giving)

    async def limit(self, context: RequestContext, resource: str) -> int:
        """Return the caller's limit of one resource; -1 is none."""
        project, user = context.project_id, context.user_id
        older = await self.find_older(context, project, user, [resource])
        api = self._cells.databases.on(API)
        return (await api.read(limits.allowed, self.defaults, project, user, older)).user[resource]

    async def allowed(self, context: RequestContext, project_id: str, user_id: str) -> Allowed:
        """Return the limits in force for a project and a user in it, of every resource."""
        older = await self.find_older(context, project_id, user_id)
        return await self._cells.databases.on(API).read(limits.allowed, self.defaults, project_id, user_id, older)

    # ---- limits that still lie in cells

    async def find_older(
        self,
        context: RequestContext,
        project_id: str,
        user_id: str,
        resources: Collection[str] = limits.RESOURCES,
        class_name: str = limits.DEFAULT_CLASS,
    ) -> Older:
        """Return the limits that cells hold and the API database lacks; of several cells the first by name.

        Raises: Unavailable when a cell that may hold one does not answer, never did, and the operator wants that.
        """
        if not self._unmoved(Kind):
            return {}
        api = self._cells.databases.on(API)
        done, known = await api.read(_known, project_id, user_id, class_name)
        self._done |= done
        owners: dict[Level, tuple[Kind, Owner]] = {
            Level.USER: (Kind.USER, (project_id, user_id)),
            Level.PROJECT: (Kind.PROJECT, project_id),
            Level.DEFAULT: (Kind.CLASS, limits.DEFAULT_CLASS),
        }
        if class_name != limits.DEFAULT_CLASS:
            owners[Level.CLASS] = Kind.CLASS, class_name
        wanted = {
            level: owner
            for level, owner in owners.items()
            if any((level, resource) not in known for resource in resources)
        }
        among = self._unmoved({kind for kind, _ in wanted.values()})

        async def ask(cell: Cell, cctx: CellContext) -> tuple[Found, list[Kind]]:
            return await self._cells.databases.on(cctx).read(_find_in_cell, wanted, among[cell])

        older: dict[tuple[Level, str], int] = {}
        empty: list[tuple[str, str]] = []
        for cell, outcome in (await gather(self._cells, context, among, ask)).items():
            key = (cell.ref.uuid, project_id, user_id, class_name)
            if isinstance(outcome, Answered):
                found, without = outcome.value
                self._last_found[key] = found
                empty += [(kind.value, cell.ref.uuid) for kind in without]
            elif key in self._last_found:
                found = self._last_found[key]
            elif self._refuses:
                raise Unavailable("quota.cell_silent", f"Cell {cell.ref.name} may hold limits, and does not answer")
            else:
                log.warning("limits_of_cell_ignored", cell=cell.ref.name, project_id=project_id)
                continue
            for level, by_resource in found.items():
                for resource, limit in by_resource.items():
                    older.setdefault((level, resource), limit)
        await self._remember(empty)
        return older

    def _unmoved(self, among: Iterable[Kind]) -> dict[Cell, list[Kind]]:
        """Return the cells that may hold limits in these tables, by name, and in which."""
        kinds = sorted(among)
        return {
            cell: left
            for cell in sorted(self._cells.snapshot.all, key=lambda cell: cell.ref.name)
            if (left := [kind for kind in kinds if (kind.value, cell.ref.uuid) not in self._done])
        }

    # ---- changing limits

    async def set_limits(
        self, context: RequestContext, project_id: str, user_id: str | None, wanted: Mapping[str, int], *, force: bool
    ) -> Allowed:
        """Set limits of a project, or of a user in it, all or none; return what is in force then.

        Raises: Invalid for a resource that has no limit, a value that is none, one below what is used (unless
        `force`), or a user's above what the project has left for him (unless `force`).
        """

        async def write(older: Older) -> Allowed:
            return await self._cells.databases.on(API).write_once(
                None, self._set, project_id, user_id, wanted, older, force=force
            )

        # Of every resource, since all of them are returned.
        return await self.decide(context, (project_id, user_id or ""), limits.RESOURCES, write)

    def _set(
        self, tx: ApiTx, project_id: str, user_id: str | None, wanted: Mapping[str, int], older: Older, *, force: bool
    ) -> Allowed:
        if user_id is None:
            limits.set_project(tx, project_id, wanted)
        else:
            limits.set_user(tx, project_id, user_id, wanted)
        # After the limits' own rows, as everybody does it; nobody is granted anything until this is committed.
        usage.lock(tx, project_id, "", [resource for resource in wanted if resource in COUNTED])
        allowed = limits.allowed(tx, self.defaults, project_id, user_id or "", older)
        if not force:
            self._check(tx, project_id, user_id, wanted, allowed)
        return allowed

    def _check(
        self, tx: ApiTx, project_id: str, user_id: str | None, wanted: Mapping[str, int], allowed: Allowed
    ) -> None:
        used = usage.find(tx, project_id, user_id or "")
        uncounted = {resource for resource in wanted if resource in COUNTED and resource != "key_pairs"} - used.keys()
        if uncounted:
            raise Uncounted(project_id, user_id or "", uncounted, first=True)
        given = limits.given_to_users(tx, project_id, but=user_id)
        for resource, limit in sorted(wanted.items()):
            least = used.get(resource, Usage()).total
            most = limits.UNLIMITED
            if user_id is None:
                least = max(least, given.get(resource, 0))
            elif allowed.project[resource] >= 0:
                most = max(0, allowed.project[resource] - given.get(resource, 0))
            if 0 <= limit < least:
                raise Invalid(
                    "quota.below_usage",
                    f"Quota limit {limit} for {resource} must be greater than or equal to already used and reserved "
                    f"{least}.",
                    resource=resource,
                )
            if most >= 0 and not 0 <= limit <= most:
                raise Invalid(
                    "quota.above_project",
                    f"Quota limit {limit} for {resource} must be less than or equal to {most}.",
                    resource=resource,
                )

    async def delete_limits(self, project_id: str, user_id: str | None) -> None:
        """Remove the limits of a project and all its users, or of one user. No cell needs to answer."""
        api = self._cells.databases.on(API)
        if user_id is None:
            await api.write_once(None, limits.delete_project, project_id)
        else:
            await api.write_once(None, limits.delete_user, project_id, user_id)

    async def class_limits(self, context: RequestContext, class_name: str = limits.DEFAULT_CLASS) -> dict[str, int]:
        """Return the limits of a quota class: its own, else those of the class `default`, else the configured."""
        older = await self.find_older(context, "", "", class_name=class_name)
        return await self._cells.databases.on(API).read(self._class_limits, class_name, older)

    async def delete_class_limits(self, class_name: str) -> None:
        """Remove the limits of a quota class. No cell needs to answer."""
        await self._cells.databases.on(API).write_once(None, limits.delete_class, class_name)

    async def explain(
        self,
        context: RequestContext,
        project_id: str,
        user_id: str,
        class_name: str = limits.DEFAULT_CLASS,
        *,
        up_to: Level,
    ) -> dict[str, Source]:
        """Return the limits in force and where each was found, of every resource, looking at no level above `up_to`."""
        older = await self.find_older(context, project_id, user_id, class_name=class_name)

        def look(tx: ApiTx) -> dict[str, Source]:
            known = limits.find(tx, project_id, user_id, class_name=class_name)
            found = limits.find(tx, project_id, user_id, class_name=class_name, older=older)
            return limits.explain(found, known, self.defaults, up_to=up_to)

        return await self._cells.databases.on(API).read(look)

    async def set_class_limits(
        self, context: RequestContext, class_name: str, wanted: Mapping[str, int]
    ) -> dict[str, int]:
        """Set limits of a quota class, all or none; return what is in force then. Raises: Invalid."""
        # First: once the limits are set, nothing may fail any more.
        older = await self.find_older(context, "", "", class_name=class_name)

        def change(tx: ApiTx) -> dict[str, int]:
            limits.set_class(tx, class_name, wanted)
            return self._class_limits(tx, class_name, older)

        return await self._cells.databases.on(API).write_once(None, change)

    def _class_limits(self, tx: ApiTx, class_name: str, older: Older) -> dict[str, int]:
        found = limits.find(tx, "", "", class_name=class_name, older=older)
        return limits.resolve(found, self.defaults, up_to=Level.CLASS)

    # ---- usage

    async def usage(self, context: RequestContext, project_id: str, user_id: str | None = None) -> dict[str, Usage]:
        """Return what a project, or a user in it, has of every resource that is counted."""
        api = self._cells.databases.on(API)
        owners = [(project_id, user_id or ""), *([("", user_id)] if user_id else [])]
        for _ in range(_COUNTS):
            try:
                return await api.read(_usages, owners, self.recount)
            except Uncounted as error:
                await self._count(context, error)
        raise _unsettled(project_id)

    async def refresh(self, context: RequestContext, project_id: str, user_id: str | None = None) -> list[str]:
        """Count a project anew, or one user in it; return the cells that were needed for it and did not answer.

        Without them a first count is left to whoever needs it, and is decided there.
        """
        silent = await self._charge_found(context, project_id)
        api = self._cells.databases.on(API)
        if silent and self._refuses:
            await api.write(usage.refresh_counted, project_id, recount=self.recount)
            return silent
        await api.write(usage.refresh, project_id, None if user_id is None else [user_id], recount=self.recount)
        await api.write(_refresh_groups, project_id)
        return silent

    async def refresh_own(self, user_id: str) -> None:
        """Count anew what is a user's alone."""
        own = Uncounted("", user_id, ["key_pairs"], first=False)
        await self._cells.databases.on(API).write(_refresh, own, self.recount)

    async def _count(self, context: RequestContext, missing: Uncounted) -> None:
        """Count what a decision found uncounted. Raises: Unavailable."""
        if not missing.resources.isdisjoint(SERVER):
            silent = await self._charge_found(context, missing.project_id)
            if silent and missing.first and self._refuses:
                raise Unavailable(
                    "quota.cell_silent",
                    f"Cell {', '.join(silent)} has servers of project {missing.project_id} that were never counted, "
                    "and does not answer",
                )
        await self._cells.databases.on(API).write_once(None, _refresh, missing, self.recount)

    async def _charge_found(self, context: RequestContext, project_id: str | None) -> list[str]:
        """Charge the servers, of a project or all, that nobody has charged; return the cells that did not answer."""
        api = self._cells.databases.on(API)
        among = [cell for cell in self._cells.snapshot.all if (_CHARGES, cell.ref.uuid) not in self._done]
        silent: dict[int, str] = {}
        left: set[int] = set()
        after = 0
        while among:
            cell_ids = [cell.id for cell in among]
            page = await api.read(usage.list_uncharged, cell_ids, project_id, after=after, most=_CHUNK)
            left |= {row.cell_id for row in page}
            waiting = {cell: uuids for cell in among if (uuids := [row[1] for row in page if row.cell_id == cell.id])}

            async def ask(cell: Cell, cctx: CellContext, waiting: Mapping[Cell, list[str]] = waiting) -> list[Size]:
                return await self._cells.databases.on(cctx).read(reading.sizes, waiting[cell])

            for cell, outcome in (await gather(self._cells, context, waiting, ask)).items():
                if isinstance(outcome, Answered):
                    for project, sizes in _by_project(outcome.value).items():
                        await api.write_once(None, _adopt, project, sizes, self.recount)
                else:
                    silent[cell.id] = cell.ref.name
            if len(page) < _CHUNK:
                break
            after = page[-1].id
        if project_id is None:
            await self._remember([(_CHARGES, cell.ref.uuid) for cell in among if cell.id not in left])
        return sorted(silent.values())

    async def _remember(self, done: Collection[tuple[str, str]]) -> None:
        if done:
            await self._cells.databases.on(API).write_once(None, _mark_complete, done)
            self._done.update(done)

    # ---- sweeping

    async def sweep(self, context: RequestContext) -> None:
        """Return expired reservations, charge what is uncharged, and find out which cells hold no limits any more.

        Any number of processes may do this.
        """
        api = self._cells.databases.on(API)
        for uuid in await api.read(usage.list_expired, _CHUNK):
            if await api.write(usage.rollback, uuid):
                log.info("reservation_expired", uuid=uuid)
        await self._charge_found(context, None)
        await self.learn(context)

    async def learn(self, context: RequestContext) -> None:
        """Find out which cells hold no limits any more, so that requests need not ask them."""
        try:
            await self.find_older(context, "", "")
        except Unavailable as error:
            log.info("limits_in_cells_unknown", reason=error.message)

    async def watch(self, context: RequestContext) -> None:
        """Sweep for ever."""
        while True:
            try:
                await self.sweep(context)
            except Unavailable as error:
                log.info("quota_sweep_waits", reason=error.message)
            await self._clock.sleep(self._config.quota_sweep_seconds)


def _unsettled(project_id: str) -> Unavailable:
    return Unavailable("quota.unsettled", f"The usage of project {project_id} could not be counted; try again")


def _find_in_cell(tx: CellTx, wanted: Wanted, kinds: Collection[Kind]) -> tuple[Found, list[Kind]]:
    """Return the limits that are wanted of these tables, and which of the tables are empty."""
    found = {
        level: by_resource
        for level, (kind, owner) in wanted.items()
        if kind in kinds and (by_resource := legacy.find_limits(tx, kind, owner))
    }
    full = {wanted[level][0] for level in found}
    return found, [kind for kind in kinds if kind not in full and legacy.is_empty(tx, kind)]


def _known(
    tx: ApiTx, project_id: str, user_id: str, class_name: str
) -> tuple[set[tuple[str, str]], Mapping[tuple[Level, str], int]]:
    return migration_state.complete_cells(tx), limits.find(tx, project_id, user_id, class_name=class_name)


def _mark_complete(tx: ApiTx, tables: Collection[tuple[str, str]]) -> None:
    for name, cell_uuid in sorted(tables):
        migration_state.mark_complete(tx, name, cell_uuid)


def _usages(tx: ApiTx, owners: Collection[tuple[str, str]], recount: Recount) -> dict[str, Usage]:
    return {resource: used for owner in owners for resource, used in usage.get(tx, *owner, recount=recount).items()}


def _by_project(sizes: Collection[Size]) -> dict[str, list[Size]]:
    projects: dict[str, list[Size]] = {}
    for size in sizes:
        projects.setdefault(size.project_id, []).append(size)
    return projects


def _adopt(tx: ApiTx, project_id: str, sizes: Collection[Size], recount: Recount) -> None:
    for size in sizes:
        if not size.live:
            # The incumbent's older releases did not mark the mappings of what they deleted.
            mappings.queue_instance_for_delete(tx, size.uuid)
    charges = [Charge(size.uuid, project_id, size.user_id, size.vcpus, size.memory_mb) for size in sizes if size.live]
    usage.adopt(tx, project_id, charges, recount=recount)


def _refresh(tx: ApiTx, missing: Uncounted, recount: Recount) -> None:
    project, user = missing.project_id, missing.user_id
    if not missing.resources.isdisjoint(SERVER):
        usage.refresh(tx, project, [user] if user else [], recount=recount)
    if "key_pairs" in missing.resources:
        usage.refresh_other(tx, project, user, "key_pairs", lambda: {user: keypairs.count(tx, user)})
    if "server_groups" in missing.resources:
        usage.refresh_other(tx, project, user, "server_groups", partial(_count_groups, tx, project, user))


def _refresh_groups(tx: ApiTx, project_id: str) -> None:
    """Count anew the server groups of a project, and of those users whose groups were counted before."""
    users = {user for user, resource in usage.list_of(tx, project_id) if resource == "server_groups"}
    for user in sorted(users - {""}):
        usage.refresh_other(tx, project_id, user, "server_groups", partial(_count_groups, tx, project_id, user))


def _count_groups(tx: ApiTx, project_id: str, user_id: str) -> dict[str, int]:
    counted = {"": server_groups.count_groups(tx, project_id)}
    return counted | {user_id: server_groups.count_groups(tx, project_id, user_id)} if user_id else counted
