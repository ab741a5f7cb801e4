"""Usage compared with what there is, across cells, while everything goes on (seed 003): `verify`, and `refresh`.

A usage is what the charges and reservations of its project add up to; a charge is what its live server takes, or its
unfinished build request. Others work meanwhile, so whatever differs is looked at once more, in an order in which no
server that is just made or deleted can seem wrong. A cell that does not answer proves nothing. The command line calls
this; nothing else needs it, since usages are right by themselves.
"""

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from cellway import builds, keypairs, server_groups
from cellway.cells import mappings
from cellway.cells.registry import Cell, Cells
from cellway.cells.scatter import Answered, gather
from cellway.compute.limits import Quotas
from cellway.context import CellContext, RequestContext
from cellway.db.engines import API
from cellway.db.transaction import ApiTx
from cellway.instances import reading
from cellway.instances.reading import Size
from cellway.instances.records import Instance
from cellway.quota import usage
from cellway.quota.usage import SERVER, Charge, Usage

_PAGE: Final = 1000
"""Servers, or charges, that are looked at together."""


class Kind(enum.StrEnum):
    """What is wrong."""

    USAGE = "usage"
    """A usage is not what its project's charges and reservations add up to, nor the server groups or keypairs."""
    UNCHARGED = "uncharged"
    """A live server, or an unfinished build, takes nothing from anybody."""
    NO_SERVER = "no server"
    """A charge is of a server that is not there."""
    SIZE = "size"
    """A server is charged for another size."""


@dataclass(frozen=True, slots=True)
class Drift:
    """One thing that is wrong: what stands in the API database, and what was counted instead."""

    kind: Kind
    project_id: str
    user_id: str
    subject: str
    """The resource of a usage, the uuid of a server."""
    stored: Mapping[str, int]
    counted: Mapping[str, int]

    @property
    def charge(self) -> Charge:
        """What the server ought to be charged."""
        return Charge(self.subject, self.project_id, self.user_id, self.counted["cores"], self.counted["ram"])


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, and the cells that did not answer: nothing is said of their servers."""

    drift: tuple[Drift, ...]
    silent: tuple[str, ...]


class Audit:
    """Compares the usages and charges of all projects with what there is."""

    def __init__(self, cells: Cells, quotas: Quotas) -> None:
        self._cells = cells
        self._quotas = quotas
        self._api = cells.databases.on(API)

    async def verify(self, context: RequestContext, project_id: str | None = None) -> Report:
        """Count everything, of one project or of all and of every user's keypairs, and return what differs."""
        usages = await self._usages(project_id)
        charges = await self._charges(context, project_id)
        return Report((*usages, *charges.drift), charges.silent)

    async def refresh(
        self, context: RequestContext, project_id: str | None = None, user_id: str | None = None
    ) -> tuple[str, ...]:
        """Mend the charges of a project, or of all, and count usages anew: of the project and all its users, or of one
        user in it; return the cells that did not answer, of whose servers nothing is changed.
        """
        found = await self._charges(context, project_id)
        for drift in found.drift:
            match drift.kind:
                case Kind.UNCHARGED:
                    await self._api.write(usage.adopt, drift.project_id, [drift.charge], recount=self._quotas.recount)
                case Kind.NO_SERVER:
                    await self._api.write(usage.refund, drift.subject)
                case Kind.SIZE:
                    await self._api.write(usage.recharge, drift.charge)
                case Kind.USAGE:
                    pass
        projects = [project_id] if project_id is not None else await self._api.read(usage.list_projects)
        silent = set(found.silent)
        for project in projects:
            silent.update(await self._quotas.refresh(context, project, user_id))
        for user in [user_id] if user_id is not None else [] if project_id is not None else await self._own_users():
            await self._quotas.refresh_own(user)
        return tuple(sorted(silent))

    async def _own_users(self) -> list[str]:
        return sorted({user for user, _ in await self._api.read(usage.list_of, "")})

    # ---- usages

    async def _usages(self, project_id: str | None) -> list[Drift]:
        found: list[Drift] = []
        for project in [project_id] if project_id is not None else await self._api.read(usage.list_projects):
            if await self._api.read(_wrong_usages, project):
                found += await self._api.write(_wrong_usages_at_rest, project)
        if project_id is None:
            for user in await self._own_users():
                if await self._api.read(_wrong_keypairs, user):
                    found += await self._api.write(_wrong_keypairs_at_rest, user)
        return found

    # ---- charges

    async def _charges(self, context: RequestContext, project_id: str | None) -> Report:
        silent: set[str] = set()
        drift = [
            *await self._of_charges(context, project_id, silent),
            *await self._of_servers(context, project_id, silent),
            *await self._of_requests(project_id),
        ]
        return Report(tuple(drift), tuple(sorted(silent)))

    async def _of_charges(self, context: RequestContext, project_id: str | None, silent: set[str]) -> list[Drift]:
        """Look for the server of every charge, but those of nothing: these never got a host, and are kept."""
        found: list[Drift] = []
        after = 0
        while True:
            last, charges, where = await self._api.read(_settled_charges, project_id, after)
            if last is None:
                return found
            after = last
            cells = self._cells.snapshot.by_id
            # What is in a cell that was made since is left out.
            suspects: dict[str, Mapping[str, int]] = {uuid: {} for uuid in charges if where.get(uuid) is None}
            among: dict[Cell, list[str]] = {}
            for uuid in charges:
                if (cell_id := where.get(uuid)) is not None and cell_id in cells:
                    among.setdefault(cells[cell_id], []).append(uuid)
            for cell, sizes in (await self._sizes(context, among, silent)).items():
                live = {size.uuid: _taken(size) for size in sizes if size.live}
                suspects |= {uuid: live.get(uuid, {}) for uuid in among[cell] if live.get(uuid) != charges[uuid].taken}
            still = await self._api.read(_still_charged, list(suspects)) if suspects else {}
            for uuid, taken in suspects.items():
                if (charge := still.get(uuid)) is not None and charge == charges[uuid]:
                    kind = Kind.SIZE if taken else Kind.NO_SERVER
                    found.append(Drift(kind, charge.project_id, charge.user_id, uuid, charge.taken, taken))

    async def _of_servers(self, context: RequestContext, project_id: str | None, silent: set[str]) -> list[Drift]:
        """Look for the charge of every live server of every cell."""
        found: list[Drift] = []
        after = dict.fromkeys(self._cells.snapshot.all, "")
        while after:

            async def ask(cell: Cell, cctx: CellContext, after: Mapping[Cell, str] = after) -> list[Size]:
                return await self._cells.databases.on(cctx).read(reading.list_sizes, after[cell], _PAGE)

            following: dict[Cell, str] = {}
            suspects: dict[Cell, list[str]] = {}
            for cell, outcome in (await gather(self._cells, context, after, ask)).items():
                if not isinstance(outcome, Answered):
                    silent.add(cell.ref.name)
                    continue
                page = outcome.value
                if len(page) == _PAGE:
                    following[cell] = page[-1].uuid
                live = [size.uuid for size in page if size.live and project_id in (None, size.project_id)]
                if live and (uncharged := await self._api.read(_uncharged, live)):
                    suspects[cell] = uncharged
            for sizes in (await self._sizes(context, suspects, silent)).values():
                found += [
                    Drift(Kind.UNCHARGED, size.project_id, size.user_id, size.uuid, {}, _taken(size))
                    for size in sizes
                    if size.live
                ]
            after = following
        return found

    async def _of_requests(self, project_id: str | None) -> list[Drift]:
        """Look for the charge of every server that is still to be built."""
        requests = {
            one.uuid: one
            for record in await self._api.read(builds.list_requests, project_id)
            for one in [msgspec.json.decode(record, type=Instance)]
        }
        uncharged = await self._api.read(_uncharged, list(requests)) if requests else []
        unfinished = await self._api.read(builds.list_unfinished, uncharged) if uncharged else set()
        charges = [
            Charge(one.uuid, one.project_id, one.user_id, one.vcpus, one.memory_mb)
            for uuid, one in requests.items()
            if uuid in unfinished
        ]
        return [Drift(Kind.UNCHARGED, one.project_id, one.user_id, one.instance_uuid, {}, one.taken) for one in charges]

    async def _sizes(
        self, context: RequestContext, among: Mapping[Cell, list[str]], silent: set[str]
    ) -> dict[Cell, list[Size]]:
        async def ask(cell: Cell, cctx: CellContext) -> list[Size]:
            return await self._cells.databases.on(cctx).read(reading.sizes, among[cell])

        answered: dict[Cell, list[Size]] = {}
        for cell, outcome in (await gather(self._cells, context, among, ask)).items():
            if isinstance(outcome, Answered):
                answered[cell] = outcome.value
            else:
                silent.add(cell.ref.name)
        return answered


def _taken(size: Size) -> dict[str, int]:
    return Charge(size.uuid, size.project_id, size.user_id, size.vcpus, size.memory_mb).taken


def _numbers(used: Usage) -> dict[str, int]:
    return {"in_use": used.in_use, "reserved": used.reserved}


def _wrong_usages(tx: ApiTx, project_id: str) -> list[Drift]:
    counted = usage.count(tx, project_id)
    found = []
    for (user, resource), stored in sorted(usage.list_of(tx, project_id).items()):
        right = counted.get((user, resource), Usage())
        if resource == "server_groups":
            right = Usage(server_groups.count_groups(tx, project_id, user or None))
        if stored != right:
            found.append(Drift(Kind.USAGE, project_id, user, resource, _numbers(stored), _numbers(right)))
    return found


def _wrong_usages_at_rest(tx: ApiTx, project_id: str) -> list[Drift]:
    usage.lock(tx, project_id, "", [*SERVER, "server_groups"])
    return _wrong_usages(tx, project_id)


def _wrong_keypairs(tx: ApiTx, user_id: str) -> list[Drift]:
    stored, right = usage.find(tx, "", user_id).get("key_pairs"), Usage(keypairs.count(tx, user_id))
    if stored is None or stored == right:
        return []
    return [Drift(Kind.USAGE, "", user_id, "key_pairs", _numbers(stored), _numbers(right))]


def _wrong_keypairs_at_rest(tx: ApiTx, user_id: str) -> list[Drift]:
    usage.lock(tx, "", user_id, ["key_pairs"])
    return _wrong_keypairs(tx, user_id)


def _settled_charges(
    tx: ApiTx, project_id: str | None, after: int
) -> tuple[int | None, dict[str, Charge], dict[str, int | None]]:
    """Return the last id of a page of charges, those of servers whose build or deletion is done, and their cells.

    Whoever is found charged, and then without a request, was in its cell by then.
    """
    page = usage.list_charges(tx, project_id, after=after, most=_PAGE)
    if not page:
        return None, {}, {}
    charges = {charge.instance_uuid: charge for _, charge in page if charge.instances}
    unfinished = builds.list_unfinished(tx, list(charges))
    where = mappings.find_instances(tx, list(charges))
    settled = {uuid: charge for uuid, charge in charges.items() if uuid not in unfinished}
    return page[-1][0], settled, {uuid: mapping.cell_id for uuid, mapping in where.items()}


def _still_charged(tx: ApiTx, uuids: Sequence[str]) -> dict[str, Charge]:
    """Return the charges of those without a request, which is looked for first: it goes together with the charge."""
    unfinished = builds.list_unfinished(tx, uuids)
    return {uuid: one for uuid, one in usage.find_charges(tx, uuids).items() if uuid not in unfinished}


def _uncharged(tx: ApiTx, uuids: Collection[str]) -> list[str]:
    """Return those that nobody is charged for, and whose deletion was not accepted."""
    charged = usage.find_charges(tx, uuids)
    without = [uuid for uuid in uuids if uuid not in charged]
    where = mappings.find_instances(tx, without) if without else {}
    return [uuid for uuid in without if uuid not in where or not where[uuid].queued_for_delete]
