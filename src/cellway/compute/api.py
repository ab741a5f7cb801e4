"""What may be asked about servers: accept, find, list, change, act on, delete. The HTTP shell calls this.

Each verb looks up the instance's cell, visits it once, and turns what it finds into a record or a domain error. Who
may do what is decided before (policy); here `Scope` says whose servers the caller can see at all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice
from typing import Concatenate, ParamSpec, TypeVar

import msgspec
import structlog

from cellway import builds, flavors, keypairs, server_groups
from cellway.builds import NewBuild
from cellway.cells import mappings
from cellway.cells.mappings import InstanceMapping
from cellway.cells.registry import Cell, Cells
from cellway.cells.scatter import Answered, gather
from cellway.compute.build import BuildSpec
from cellway.compute.fleet import Fleet
from cellway.compute.limits import Quotas
from cellway.config import Limits
from cellway.context import CellContext, Clock, RequestContext
from cellway.db.engines import API
from cellway.db.transaction import ApiTx, CellTx
from cellway.errors import CellUnavailable, Conflict, Forbidden, Invalid, NotFound, OverQuota, Unavailable
from cellway.flavors import Flavor
from cellway.ids import IdSource
from cellway.instances import actions, reading, writing
from cellway.instances.actions import ActionRecord, Event
from cellway.instances.reading import Filter, Sort
from cellway.instances.records import Instance, VmState
from cellway.outside import Image, ImageCatalog
from cellway.quota import limits as quota_limits
from cellway.quota import usage
from cellway.quota.limits import Allowed, Older
from cellway.quota.usage import Charge
from cellway.rpc.calls import ACT_ON_INSTANCE, ActOnInstance, host_address
from cellway.rpc.messaging import cast

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose servers are visible: one project's, or everybody's; and whether locks of others may be passed."""

    all_projects: bool = False
    passes_locks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NewServer:
    """A create request, its syntax checked. `count` servers are accepted, or as many as there is quota for, or, where
    that is fewer than `least`, none.
    """

    name: str
    flavor_id: str
    image_id: str
    count: int = 1
    least: int = 1
    key_name: str | None = None
    zone: str | None = None
    host: str | None = None
    description: str | None = None
    user_data: str | None = None
    config_drive: bool = False
    auto_disk_config: bool = False
    access_ip_v4: str | None = None
    access_ip_v6: str | None = None
    group: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    allow_zero_disk: bool = False
    """Whether the caller may use a flavor without a disk limit for an image."""


class ComputeApi:
    """The verbs on servers."""

    def __init__(
        self,
        cells: Cells,
        fleet: Fleet,
        images: ImageCatalog,
        quotas: Quotas,
        *,
        limits: Limits,
        clock: Clock,
        ids: IdSource,
        accepted: Callable[[], None],
        deleted: Callable[[str], None],
    ) -> None:
        """`accepted` and `deleted` are told of new work, so that a builder in this process need not look for it."""
        self._cells = cells
        self._fleet = fleet
        self._images = images
        self._quotas = quotas
        self._limits = limits
        self._clock = clock
        self._ids = ids
        self._accepted = accepted
        self._deleted = deleted

    # ---- create

    async def create_servers(self, context: RequestContext, new: NewServer) -> list[Instance]:
        """Accept servers: everything about them is written in one transaction, and they will be built.

        Raises: Invalid for an unknown flavor, image, key, zone or group, or an image that the flavor cannot hold.
        """
        image = await self._images.find(new.image_id)
        if image is None:
            raise Invalid("server.no_image", f"Image {new.image_id} could not be found.", image=new.image_id)
        if new.zone is not None and new.zone not in self.zones():
            # What is remembered of the aggregates may be old: nobody is refused on that.
            await self._fleet.reload()
        if new.zone is not None and new.zone not in self.zones():
            raise Invalid(
                "server.no_zone", f"The requested availability zone is not available: {new.zone}", zone=new.zone
            )
        reservation = f"r-{self._ids.token()}"
        api = self._cells.databases.on(API)

        async def accept(older: Older, count: int = new.count) -> list[Instance]:
            uuids = [self._ids.uuid() for _ in range(count)]
            try:
                return await api.write_once(
                    lambda tx: mappings.find_instance(tx, uuids[0]) is not None,
                    self._accept, context, new, image, uuids, reservation, older,
                )  # fmt: skip
            except OverQuota as error:
                room = error.fields.get("room", 0)
                if not isinstance(room, int) or not new.least <= room < count:
                    raise
            return await accept(older, room)

        owner = context.project_id, context.user_id
        made = await self._quotas.decide(context, owner, usage.SERVER, accept)
        self._accepted()
        log.info("servers_accepted", request_id=context.request_id, instance_uuids=[one.uuid for one in made])
        return made

    def _accept(
        self,
        tx: ApiTx,
        context: RequestContext,
        new: NewServer,
        image: Image,
        uuids: Sequence[str],
        reservation: str,
        older: Older,
    ) -> list[Instance]:
        try:
            flavor = flavors.get(
                tx, new.flavor_id, project_id=context.project_id, all_projects="admin" in context.roles
            )
        except NotFound as error:
            raise Invalid("server.no_flavor", error.message, flavor=new.flavor_id) from error
        _check_image(flavor, image)
        if flavor.root_gb == 0 and not new.allow_zero_disk:
            raise Forbidden("server.zero_disk", "Only volume-backed servers are allowed for flavors with zero disk.")
        public_key = None
        if new.key_name is not None:
            try:
                public_key = keypairs.get(tx, context.user_id, new.key_name).public_key
            except NotFound as error:
                raise Invalid("server.no_key", "Invalid key_name provided.", key=new.key_name) from error
        stored = flavors.to_stored(flavor)
        made = [
            Instance(
                uuid=uuid,
                project_id=context.project_id,
                user_id=context.user_id,
                display_name=new.name if len(uuids) == 1 else f"{new.name}-{index + 1}",
                display_description=new.description,
                hostname=_hostname(new.name, uuid),
                created_at=tx.now.replace(microsecond=0),
                flavor=stored,
                vcpus=flavor.vcpus,
                memory_mb=flavor.memory_mb,
                root_gb=flavor.root_gb,
                ephemeral_gb=flavor.ephemeral_gb,
                instance_type_id=flavor.id,
                image_ref=image.id,
                key_name=new.key_name,
                key_data=public_key,
                user_data=new.user_data,
                reservation_id=reservation,
                launch_index=index,
                availability_zone=new.zone,
                config_drive="True" if new.config_drive else "",
                auto_disk_config=new.auto_disk_config,
                access_ip_v4=new.access_ip_v4,
                access_ip_v6=new.access_ip_v6,
                root_device_name="/dev/vda",
                metadata=dict(new.metadata),
                tags=tuple(sorted(set(new.tags))),
            )
            for index, uuid in enumerate(uuids)
        ]
        wanted = BuildSpec(request_id=context.request_id, zone=new.zone, host=new.host, group=new.group)
        spec = msgspec.json.encode(wanted).decode()
        builds.create(
            tx,
            [NewBuild(one.uuid, one.project_id, msgspec.json.encode(one).decode(), spec) for one in made],
        )
        mappings.create_instances(tx, uuids, project_id=context.project_id, user_id=context.user_id)
        if new.group is not None:
            _join_group(tx, context, new.group, uuids)
        charges = [Charge(one.uuid, one.project_id, one.user_id, one.vcpus, one.memory_mb) for one in made]

        def allowed() -> Allowed:
            found = quota_limits.allowed(tx, self._quotas.defaults, context.project_id, context.user_id, older)
            _check_metadata(new.metadata, found.user["metadata_items"])
            if new.group is not None:
                _check_group(tx, new.group, context.user_id, found.user["server_group_members"])
            return found

        usage.reserve_servers(tx, charges, allowed, least=new.least, recount=self._quotas.recount)
        return made

    def zones(self) -> dict[str, bool]:
        """Return every availability zone that has a host, and whether one of its hosts takes servers.

        No cell is asked. The default zone is there also while there are no hosts at all.
        """
        zones: dict[str, bool] = {}
        for state in self._fleet.states():
            zones[state.zone] = zones.get(state.zone, False) or (state.up and state.enabled)
        return zones or {self._fleet.default_zone: False}

    # ---- find

    async def get_server(self, context: RequestContext, uuid: str, scope: Scope) -> Instance:
        """Return a server. Raises: NotFound, also for one that the caller may not see; CellUnavailable."""
        mapping = await self._mapping(context, uuid, scope)
        if mapping.cell_id is not None:
            found = await self._find_in_cell(context, mapping, uuid)
            if found is not None and not found.deleted:
                return found
        return await self._while_building(context, mapping, uuid, scope)

    async def _mapping(self, context: RequestContext, uuid: str, scope: Scope) -> InstanceMapping:
        mapping = await self._cells.find_mapping(uuid)
        if mapping is None or not (scope.all_projects or mapping.project_id == context.project_id):
            raise reading.not_found(uuid)
        return mapping

    async def _find_in_cell(self, context: RequestContext, mapping: InstanceMapping, uuid: str) -> Instance | None:
        cell = await self._cells.cell_of(mapping)
        with self._cells.target_cell(context, cell) as cctx:
            return await self._cells.databases.on(cctx).read(reading.find, uuid)

    async def _while_building(
        self, context: RequestContext, seen: InstanceMapping, uuid: str, scope: Scope
    ) -> Instance:
        """The cell has no such instance (yet): the build request is the answer, or the mapping has moved on since."""
        record = await self._cells.databases.on(API).read(builds.find_request, uuid)
        if record is not None:
            return msgspec.json.decode(record, type=Instance)
        mapping = await self._cells.find_mapping(uuid, fresh=True)
        if mapping is not None and mapping.cell_id is not None:
            found = await self._find_in_cell(context, mapping, uuid)
            if found is not None and not found.deleted:
                return found
        raise reading.not_found(uuid)

    async def list_servers(
        self,
        context: RequestContext,
        where: Filter,
        sort: Sort,
        *,
        limit: int,
        marker: str | None,
        scope: Scope,
        details: bool,
    ) -> list[Instance]:
        """Return a page of servers from all cells that may hold one, in one order, each once.

        A cell that does not answer is left out and logged. Raises: Invalid for a marker that is not a visible server.
        """
        after = None
        if marker is not None:
            try:
                last = await self._marked(context, marker, scope, deleted_too=where.deleted is not False)
                after = reading.sort_values(last, sort)
            except NotFound as error:
                raise Invalid("request.bad_marker", f"marker [{marker}] not found", marker=marker) from error
        requests, cell_ids = await self._cells.databases.on(API).read(_building_and_cells, where.project_id)
        among = [cell for cell in self._cells.snapshot.all if cell_ids is None or cell.id in cell_ids]

        async def ask(_cell: Cell, cctx: CellContext) -> list[Instance]:
            return await self._cells.databases.on(cctx).read(
                reading.list_page, where, sort, limit, after, details=details
            )

        pages: list[list[Instance]] = []
        for cell, outcome in (await gather(self._cells, context, among, ask)).items():
            if isinstance(outcome, Answered):
                pages.append(outcome.value)
            else:
                log.warning("cell_left_out_of_list", cell=cell.ref.name, request_id=context.request_id)
        key = reading.sort_key(sort)
        placed = {instance.uuid for page in pages for instance in page}
        pages.append(_building_page(requests, where, sort, after, placed))
        unique: dict[str, Instance] = {}
        for instance in merge(*pages, key=key):
            unique.setdefault(instance.uuid, instance)
            if len(unique) == limit:
                break
        return list(islice(unique.values(), limit))

    async def _marked(self, context: RequestContext, marker: str, scope: Scope, *, deleted_too: bool) -> Instance:
        """Return the server that a page begins after. Raises: NotFound."""
        if deleted_too:
            mapping = await self._mapping(context, marker, scope)
            found = await self._find_in_cell(context, mapping, marker) if mapping.cell_id is not None else None
            if found is not None:
                return found
        return await self.get_server(context, marker, scope)

    async def get_owner(self, context: RequestContext, uuid: str, scope: Scope) -> InstanceMapping:
        """Return whose a server is, or was, without asking its cell. Raises: NotFound."""
        return await self._mapping(context, uuid, scope)

    async def flavor_row_id(self, context: RequestContext, flavor_id: str) -> int | None:
        """Return the row id by which instances refer to a flavor, or None when there is none."""
        try:
            flavor = await self._cells.databases.on(API).read(
                flavors.get, flavor_id, project_id=context.project_id, all_projects=True
            )
        except NotFound:
            return None
        return flavor.id

    # ---- change

    async def _change(
        self,
        context: RequestContext,
        uuid: str,
        scope: Scope,
        function: Callable[Concatenate[CellTx, str, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Write to a server in its cell.

        Raises: NotFound; Conflict while it is still to be placed, since then there is nothing to write to.
        """
        mapping = await self._mapping(context, uuid, scope)
        if mapping.cell_id is None:
            await self._while_building(context, mapping, uuid, scope)
            raise _being_built(uuid)
        cell = await self._cells.cell_of(mapping)

        def guarded(tx: CellTx) -> T:
            instance = reading.find(tx, uuid)
            if instance is None or instance.deleted:
                raise _NotHere
            if instance.vm_state == VmState.BUILDING:
                # A build that moves to another host makes the instance anew from its request.
                raise _being_built(uuid)
            return function(tx, uuid, *args, **kwargs)

        with self._cells.target_cell(context, cell) as cctx:
            try:
                return await self._cells.databases.on(cctx).write_once(None, guarded)
            except _NotHere:
                # It is gone, or on its way into this cell or another.
                self._cells.forget_mapping(uuid)
                await self._while_building(context, mapping, uuid, scope)
                raise _being_built(uuid) from None

    async def update_server(
        self, context: RequestContext, uuid: str, scope: Scope, values: Mapping[str, object]
    ) -> Instance:
        """Set columns of the server's record that belong to the user, and return it."""
        return await self._change(context, uuid, scope, writing.update, values)

    async def lock(self, context: RequestContext, uuid: str, scope: Scope) -> None:
        """Lock a server: its owner's lock, or an admin's."""
        instance = await self.get_server(context, uuid, scope)
        by = "owner" if instance.project_id == context.project_id and not scope.passes_locks else "admin"
        await self._change(context, uuid, scope, writing.set_lock, by)

    async def unlock(self, context: RequestContext, uuid: str, scope: Scope) -> None:
        """Unlock a server. Raises: Forbidden when an admin locked it and the caller may not pass that."""
        instance = await self.get_server(context, uuid, scope)
        if instance.locked_by == "admin" and not scope.passes_locks:
            raise Forbidden("instance.locked_by_admin", f"Instance {uuid} is locked by an administrator")
        await self._change(context, uuid, scope, writing.set_lock, None)

    async def reset_state(self, context: RequestContext, uuid: str, scope: Scope, vm_state: VmState) -> None:
        """Set a server's state by decree."""
        await self._change(context, uuid, scope, writing.reset_state, vm_state)

    async def merge_metadata(
        self, context: RequestContext, uuid: str, scope: Scope, items: Mapping[str, str], *, replace: bool
    ) -> dict[str, str]:
        """Add metadata, or replace it all; return what the server has then.

        Raises: Conflict when locked; OverQuota.
        """
        most = await self._quotas.limit(context, "metadata_items")
        return await self._change(context, uuid, scope, _merge_metadata, items, replace, scope.passes_locks, most)

    async def delete_metadata(self, context: RequestContext, uuid: str, scope: Scope, key: str) -> None:
        """Remove one metadata key."""
        await self._change(context, uuid, scope, _delete_metadata, key, scope.passes_locks)

    async def replace_tags(
        self, context: RequestContext, uuid: str, scope: Scope, tags: Sequence[str]
    ) -> tuple[str, ...]:
        """Set the server's tags to exactly these."""
        return await self._change(context, uuid, scope, writing.replace_tags, tags)

    async def add_tag(self, context: RequestContext, uuid: str, scope: Scope, tag: str) -> bool:
        """Add a tag; tell whether it is new. Raises: Invalid when there are too many."""
        return await self._change(context, uuid, scope, _add_tag, tag, self._limits.tags_per_server)

    async def delete_tag(self, context: RequestContext, uuid: str, scope: Scope, tag: str) -> None:
        """Remove a tag."""
        await self._change(context, uuid, scope, writing.delete_tag, tag)

    # ---- act

    async def act(self, context: RequestContext, uuid: str, scope: Scope, operation: str) -> None:
        """Begin an operation of `instances.actions.TRANSITIONS`: record it in the cell, then tell the host's agent.

        Raises: NotFound; Conflict for a locked or busy server or a wrong state; Unavailable when the cell or its
        queue does not answer.
        """
        host = await self._change(
            context,
            uuid,
            scope,
            actions.begin,
            operation,
            request_id=context.request_id,
            user_id=context.user_id,
            project_id=context.project_id,
            may_override_lock=scope.passes_locks,
        )
        mapping = await self._mapping(context, uuid, scope)
        with self._cells.target_cell(context, await self._cells.cell_of(mapping)) as cctx:
            try:
                await cast(
                    cctx,
                    ACT_ON_INSTANCE,
                    ActOnInstance(instance_uuid=uuid, action=operation),
                    address=host_address(host),
                    timeout_seconds=self._limits.rpc_timeout_seconds,
                )
            except Unavailable as error:
                # Nobody sends it again: without this the server would wait for its host until that starts anew.
                await self._cells.databases.on(cctx).write_once(
                    None, actions.take_back, uuid, operation, request_id=context.request_id, failure=error.message
                )
                raise

    async def delete_server(self, context: RequestContext, uuid: str, scope: Scope) -> None:
        """Accept a server's deletion; it is carried out even if its cell is down now.

        Raises: NotFound; Conflict when it is locked and the caller may not pass that.
        """
        mapping = await self._mapping(context, uuid, scope)
        try:
            instance = await self.get_server(context, uuid, scope)
            actions.check_lock(instance, may_override=scope.passes_locks)
        except CellUnavailable:
            log.info("delete_accepted_unseen", instance_uuid=uuid, request_id=context.request_id)
        await self._cells.databases.on(API).write_once(
            lambda tx: _is_going(tx, uuid), _request_delete, mapping, context
        )
        self._deleted(uuid)

    # ---- history

    async def list_actions(self, context: RequestContext, uuid: str, scope: Scope) -> list[ActionRecord]:
        """Return what was asked of a server, the latest first; also of a deleted one."""
        return await self._read_history(context, uuid, scope, actions.list_of)

    async def get_action(
        self, context: RequestContext, uuid: str, scope: Scope, request_id: str
    ) -> tuple[ActionRecord, Sequence[Event]]:
        """Return one action and its events. Raises: NotFound."""
        return await self._read_history(context, uuid, scope, actions.get_with_events, request_id)

    async def _read_history(
        self,
        context: RequestContext,
        uuid: str,
        scope: Scope,
        function: Callable[Concatenate[CellTx, str, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        mapping = await self._mapping(context, uuid, scope)
        if mapping.cell_id is None:
            raise reading.not_found(uuid)
        with self._cells.target_cell(context, await self._cells.cell_of(mapping)) as cctx:
            return await self._cells.databases.on(cctx).read(function, uuid, *args, **kwargs)


class _NotHere(Exception):
    """The cell that the mapping names does not have the live instance; raised so that the transaction ends."""


def _being_built(uuid: str) -> Conflict:
    return Conflict("instance.building", f"Instance {uuid} is being built; try again when it is ready", instance=uuid)


def _check_image(flavor: Flavor, image: Image) -> None:
    if image.min_ram_mb > flavor.memory_mb:
        raise Invalid("server.too_little_ram", "Flavor's memory is too small for requested image.", image=image.id)
    if flavor.root_gb and image.min_disk_gb > flavor.root_gb:
        raise Invalid("server.too_little_disk", "Flavor's disk is too small for requested image.", image=image.id)


def _join_group(tx: ApiTx, context: RequestContext, uuid: str, servers: Sequence[str]) -> None:
    """Make new servers members of a group of their project, which is held from then on: no other joins meanwhile.

    Raises: Invalid when the project has no such group.
    """
    try:
        if server_groups.get(tx, uuid).project_id != context.project_id:
            raise server_groups.not_found(uuid)
        server_groups.add_members(tx, uuid, servers)
    except NotFound as error:
        raise Invalid("server.no_group", error.message, group=uuid) from error


def _check_group(tx: ApiTx, group: str, user_id: str, most: int) -> None:
    """Refuse a group in which a user has more servers than he may. Raises: OverQuota."""
    if 0 <= most < server_groups.count_members(tx, group, user_id):
        raise OverQuota("server.full_group", "Quota exceeded, too many servers in group", limit=most)


def _hostname(name: str, uuid: str) -> str:
    """Return a name that is valid as a host name: what is allowed in `name`, or one made from the uuid."""
    kept = "".join(character if character.isascii() and character.isalnum() else "-" for character in name.lower())
    return kept.strip("-")[:63].rstrip("-") or f"server-{uuid}"


def _building_and_cells(tx: ApiTx, project_id: str | None) -> tuple[list[str], set[int] | None]:
    requests = builds.list_requests(tx, project_id)
    return requests, mappings.cells_of_project(tx, project_id) if project_id is not None else None


def _building_page(
    records: Sequence[str], where: Filter, sort: Sort, after: Sequence[object] | None, placed: set[str]
) -> list[Instance]:
    """Return, in order, the requests that fit the filter, follow the marker and are not in a cell's page."""
    key = reading.sort_key(sort)
    fitting = [
        instance
        for record in records
        if (instance := msgspec.json.decode(record, type=Instance)).uuid not in placed
        and reading.matches(instance, where)
    ]
    fitting.sort(key=key)
    if after is None:
        return fitting
    marker = reading.key_of_values(sort, after)
    return [instance for instance in fitting if key(instance) > marker]


def _merge_metadata(
    tx: CellTx, uuid: str, items: Mapping[str, str], replace: bool, may_override_lock: bool, most: int
) -> dict[str, str]:
    actions.check_lock(reading.get(tx, uuid), may_override=may_override_lock)
    merged = writing.merge_metadata(tx, uuid, items, replace=replace)
    _check_metadata(merged, most)
    return merged


def _check_metadata(items: Mapping[str, str], most: int) -> None:
    if 0 <= most < len(items):
        raise OverQuota("server.too_much_metadata", f"Maximum number of metadata items exceeds {most}", limit=most)


def _delete_metadata(tx: CellTx, uuid: str, key: str, may_override_lock: bool) -> None:
    actions.check_lock(reading.get(tx, uuid), may_override=may_override_lock)
    writing.delete_metadata(tx, uuid, key)


def _add_tag(tx: CellTx, uuid: str, tag: str, most: int) -> bool:
    have = reading.get(tx, uuid).tags
    if tag not in have and len(have) >= most:
        raise Invalid("server.too_many_tags", f"The number of tags exceeded the per-server limit {most}", limit=most)
    return writing.add_tag(tx, uuid, tag)


def _is_going(tx: ApiTx, uuid: str) -> bool:
    mapping = mappings.find_instance(tx, uuid)
    return mapping is not None and mapping.queued_for_delete


def _request_delete(tx: ApiTx, mapping: InstanceMapping, context: RequestContext) -> None:
    mappings.queue_instance_for_delete(tx, mapping.instance_uuid)
    builds.request_delete(
        tx,
        mapping.instance_uuid,
        project_id=mapping.project_id,
        user_id=context.user_id,
        request_id=context.request_id,
    )
