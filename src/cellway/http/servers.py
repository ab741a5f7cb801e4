"""Servers: list, show, create, update, delete, and their addresses."""

import ipaddress
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cellway.compute.api import NewServer, Scope
from cellway.errors import Invalid, NotFound
from cellway.http.routes import Route
from cellway.http.server_query import read_query
from cellway.http.server_views import Viewer, addresses_of, full_view, summary
from cellway.http.wire import Answer, Body, Call, Link, Metadata, Name, answer
from cellway.ids import is_uuid
from cellway.instances.reading import not_found
from cellway.instances.records import Instance


def scope_of(call: Call) -> Scope:
    """Return whose servers the caller can see, and whether other people's locks hold for them."""
    return Scope(
        all_projects=call.allows("context_is_admin"),
        passes_locks=call.allows("os_compute_api:os-lock-server:unlock:unlock_override"),
    )


async def find(call: Call, rule: str | None = None) -> Instance:
    """Return the server that the path names, once the policy lets its owner's caller at it.

    Raises: NotFound, Forbidden.
    """
    uuid = server_id(call)
    instance = await call.services.compute.get_server(call.context, uuid, scope_of(call))
    call.require(project_id=instance.project_id, user_id=instance.user_id, rule=rule)
    return instance


async def owned_id(call: Call) -> str:
    """Return the uuid in the path, once the policy lets its owner's caller at it; the cell is not asked.

    Raises: NotFound, Forbidden.
    """
    uuid = server_id(call)
    owner = await call.services.compute.get_owner(call.context, uuid, scope_of(call))
    call.require(project_id=owner.project_id, user_id=owner.user_id)
    return uuid


def server_id(call: Call) -> str:
    """Return the uuid in the path. Raises: NotFound for what cannot be one."""
    uuid = call.path["server_id"]
    if not is_uuid(uuid):
        raise not_found(uuid[:255])
    return uuid.lower()


# ---- list and show ---------------------------------------------------------------------------------------------


async def list_summaries(call: Call) -> Answer:
    """`GET /servers`"""
    return await _list(call, details=False)


async def list_details(call: Call) -> Answer:
    """`GET /servers/detail`"""
    return await _list(call, details=True)


async def _list(call: Call, *, details: bool) -> Answer:
    query = await read_query(call)
    found = await call.services.compute.list_servers(
        call.context,
        query.where,
        query.sort,
        limit=query.limit,
        marker=query.marker,
        scope=Scope(all_projects=query.where.project_id is None or call.allows("context_is_admin")),
        details=details,
    )
    viewer = Viewer(call)
    listed = [viewer.view(one) for one in found] if details else [summary(call, one) for one in found]
    body: dict[str, Any] = {"servers": listed}
    links = call.next_links("servers/detail" if details else "servers", [one.uuid for one in found], query.limit)
    if links:
        body["servers_links"] = links
    return answer(body)


async def show(call: Call) -> Answer:
    """`GET /servers/{server_id}`"""
    return answer({"server": full_view(call, await find(call))})


async def list_addresses(call: Call) -> Answer:
    """`GET /servers/{server_id}/ips`"""
    return answer({"addresses": _plain_addresses(await find(call))})


async def show_addresses(call: Call) -> Answer:
    """`GET /servers/{server_id}/ips/{network}`"""
    network = call.path["network"]
    addresses = _plain_addresses(await find(call))
    if network not in addresses:
        raise NotFound("server.no_network", "Instance is not a member of specified network", network=network)
    return answer({network: addresses[network]})


def _plain_addresses(instance: Instance) -> dict[str, list[dict[str, Any]]]:
    return {
        network: [{"addr": one["addr"], "version": one["version"]} for one in listed]
        for network, listed in addresses_of(instance).items()
    }


# ---- create ----------------------------------------------------------------------------------------------------

Count = Annotated[int, Meta(ge=1, le=0x7FFFFFFF)] | Annotated[str, Meta(pattern=r"^[0-9]{1,10}$")]
Truth = bool | Literal["True", "true", "False", "false", "1", "0", "on", "off", "yes", "no", "TRUE", "FALSE"]
Description = Annotated[str, Meta(max_length=255)]
"""As long as the column that holds it."""
Tag = Annotated[str, Meta(min_length=1, max_length=60, pattern=r"^[^,/]*$")]


class BlockDevice(msgspec.Struct, frozen=True):
    """An entry of `block_device_mapping_v2`: clients send the image as one; volumes are not served."""

    source_type: str = ""
    destination_type: str = ""
    uuid: str | None = None
    boot_index: int | str | None = None


class SecurityGroup(Body, frozen=True):
    """Accepted and shown, as long as there is no network service."""

    name: Annotated[str, Meta(max_length=255)]


class CreateServer(Body, frozen=True):
    """The `server` of a create request, at 2.1."""

    name: Name
    flavorRef: str | int
    imageRef: str = ""
    networks: list[dict[str, Any]] | str | UnsetType = UNSET
    availability_zone: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    key_name: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    metadata: Metadata = {}
    security_groups: list[SecurityGroup] = []
    user_data: str | None = None
    config_drive: Truth = False
    min_count: Count | None = None
    max_count: Count | None = None
    return_reservation_id: Truth = False
    adminPass: Annotated[str, Meta(max_length=255)] | None = None
    block_device_mapping_v2: list[BlockDevice] = []
    disk_config: Literal["AUTO", "MANUAL"] = msgspec.field(default="MANUAL", name="OS-DCF:diskConfig")
    accessIPv4: str = ""
    accessIPv6: str = ""
    personality: list[Any] = []


class CreateServer19(CreateServer, frozen=True):
    """From 2.19: a description."""

    description: Description | None = None


class CreateServer52(CreateServer19, frozen=True):
    """From 2.52: tags."""

    tags: Annotated[list[Tag], Meta(max_length=50)] = []


class Hints(msgspec.Struct, frozen=True):
    """Scheduler hints. Only the server group is heeded; what else a client may send is ignored."""

    group: str | UnsetType = UNSET


class CreateBody(Body, frozen=True):
    """`POST /servers`"""

    server: CreateServer
    hints: Hints | UnsetType = msgspec.field(default=UNSET, name="os:scheduler_hints")
    old_hints: Hints = msgspec.field(default=Hints(), name="OS-SCH-HNT:scheduler_hints")


class CreateBody19(CreateBody, frozen=True):
    """From 2.19."""

    server: CreateServer19


class CreateBody52(CreateBody19, frozen=True):
    """From 2.52."""

    server: CreateServer52


async def create(call: Call) -> Answer:
    """`POST /servers`"""
    kind = CreateBody52 if call.version >= 52 else CreateBody19 if call.version >= 19 else CreateBody
    body = call.decode(kind)
    wanted = body.server
    _check_networks(call, wanted)
    if wanted.personality:
        raise Invalid("server.no_personality", "Files cannot be put into servers here: send user_data")
    zone, host = _zone_and_host(call, wanted.availability_zone)
    least, most = _counts(call, wanted)
    new = NewServer(
        name=wanted.name,
        flavor_id=str(wanted.flavorRef).rstrip("/").rpartition("/")[2],
        image_id=_image(wanted),
        count=most,
        least=least,
        key_name=wanted.key_name,
        zone=zone,
        host=host,
        description=wanted.description if isinstance(wanted, CreateServer19) else wanted.name,
        user_data=_user_data(call, wanted.user_data),
        config_drive=_true(wanted.config_drive),
        auto_disk_config=wanted.disk_config == "AUTO",
        access_ip_v4=access_ip(wanted.accessIPv4, 4),
        access_ip_v6=access_ip(wanted.accessIPv6, 6),
        group=_group(body),
        metadata=wanted.metadata,
        tags=tuple(wanted.tags) if isinstance(wanted, CreateServer52) else (),
        allow_zero_disk=call.allows("os_compute_api:servers:create:zero_disk_flavor"),
    )
    made = await call.services.compute.create_servers(call.context, new)
    if _true(wanted.return_reservation_id):
        return answer({"reservation_id": made[0].reservation_id}, 202)
    first = made[0].uuid
    links: list[Link] = call.links("servers", first)
    view = {
        "id": first,
        "links": links,
        "OS-DCF:diskConfig": wanted.disk_config,
        "security_groups": [{"name": group.name} for group in wanted.security_groups] or [{"name": "default"}],
        "adminPass": wanted.adminPass or call.services.ids.token(),
    }
    return answer({"server": view}, 202, [("Location", links[0].href)])


def _true(word: bool | str) -> bool:
    return word is True or (isinstance(word, str) and word.lower() in ("true", "1", "on", "yes"))


def _counts(call: Call, wanted: CreateServer) -> tuple[int, int]:
    least = int(wanted.min_count) if wanted.min_count is not None else 1
    most = int(wanted.max_count) if wanted.max_count is not None else least
    if least < 1 or most < 1:
        raise Invalid("server.bad_count", "min_count and max_count must be 1 at least")
    if least > most:
        raise Invalid("server.bad_count", "min_count must be <= max_count")
    if most > call.limits.servers_per_request:
        raise Invalid("server.bad_count", f"max_count may be {call.limits.servers_per_request} at most")
    if most > 1 and len(f"{wanted.name}-{most}") > call.limits.name_characters:
        raise Invalid("server.name_too_long", "The name leaves no room for the number at each server's name's end")
    return least, most


def _check_networks(call: Call, wanted: CreateServer) -> None:
    """There is no network service: servers have no ports, which `auto`, `none` and leaving it out all mean here."""
    if call.version >= 37 and wanted.networks is UNSET:
        raise Invalid("server.no_networks", "Invalid input: 'networks' is a required property")
    if isinstance(wanted.networks, str):
        if wanted.networks not in ("auto", "none") or call.version < 37:
            raise Invalid("server.bad_networks", "networks must be a list, or from 2.37 auto or none")
    elif wanted.networks:
        raise Invalid("server.no_network_service", "No network service is available: use auto, none or no networks")


def _image(wanted: CreateServer) -> str:
    images = {wanted.imageRef.rstrip("/").rpartition("/")[2]} - {""}
    for device in wanted.block_device_mapping_v2:
        if device.source_type != "image" or device.destination_type not in ("", "local") or device.uuid is None:
            raise Invalid("server.no_volume_service", "No volume service is available: boot from an image alone")
        images.add(device.uuid)
    if len(images) != 1:
        raise Invalid("server.no_image", "Exactly one image is needed to boot from")
    image = images.pop()
    if not is_uuid(image):
        raise Invalid("server.bad_image", "Invalid imageRef provided.")
    return image


def _user_data(call: Call, encoded: str | None) -> str | None:
    if encoded is None:
        return None
    if len(encoded) > call.limits.user_data_bytes:
        raise Invalid("server.user_data_too_long", f"User data may be {call.limits.user_data_bytes} characters at most")
    try:
        msgspec.json.decode(msgspec.json.encode(encoded), type=bytes)
    except msgspec.ValidationError as error:
        raise Invalid("server.bad_user_data", "User data needs to be valid base 64.") from error
    return encoded


def _zone_and_host(call: Call, zone: str | None) -> tuple[str | None, str | None]:
    """Split `zone:host`, which only some may ask for. Raises: Forbidden, Invalid."""
    if zone is None or ":" not in zone:
        return zone, None
    name, _, rest = zone.partition(":")
    host, _, node = rest.partition(":")
    if ":" in node:
        raise Invalid("server.bad_zone", "Unable to parse availability_zone")
    call.require(rule="os_compute_api:servers:create:forced_host")
    return name or None, host or node or None


def _group(body: CreateBody) -> str | None:
    """Return the server group that the hints name. Raises: Invalid for what cannot be one."""
    group = (body.old_hints if body.hints is UNSET else body.hints).group
    if group is UNSET:
        return None
    if not is_uuid(group):
        raise Invalid("server.bad_group", "The scheduler hint group must be the uuid of a server group")
    return group.lower()


def access_ip(text: str | None, version: int) -> str | None:
    """Return an access address, or None for an empty one. Raises: Invalid."""
    if not text:
        return None
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError as error:
        raise Invalid("server.bad_address", f"accessIPv{version} is not an IPv{version} address") from error
    if parsed.version != version or "%" in text:
        raise Invalid("server.bad_address", f"accessIPv{version} is not an IPv{version} address")
    return str(parsed)


# ---- update and delete -----------------------------------------------------------------------------------------


class UpdateServer(Body, frozen=True):
    """The `server` of an update, at 2.1. What is left out stays."""

    name: Name | UnsetType = UNSET
    accessIPv4: str | UnsetType = UNSET
    accessIPv6: str | UnsetType = UNSET
    disk_config: Literal["AUTO", "MANUAL"] | UnsetType = msgspec.field(default=UNSET, name="OS-DCF:diskConfig")


class UpdateServer19(UpdateServer, frozen=True):
    """From 2.19: a description."""

    description: Description | UnsetType | None = UNSET


class UpdateBody(Body, frozen=True):
    """`PUT /servers/{server_id}`"""

    server: UpdateServer


class UpdateBody19(Body, frozen=True):
    """From 2.19."""

    server: UpdateServer19


async def update(call: Call) -> Answer:
    """`PUT /servers/{server_id}`"""
    wanted = (call.decode(UpdateBody19) if call.version >= 19 else call.decode(UpdateBody)).server
    values: dict[str, object] = {}
    if wanted.name is not UNSET:
        values["display_name"] = wanted.name
    if wanted.accessIPv4 is not UNSET:
        values["access_ip_v4"] = access_ip(wanted.accessIPv4, 4)
    if wanted.accessIPv6 is not UNSET:
        values["access_ip_v6"] = access_ip(wanted.accessIPv6, 6)
    if wanted.disk_config is not UNSET:
        values["auto_disk_config"] = wanted.disk_config == "AUTO"
    if isinstance(wanted, UpdateServer19) and wanted.description is not UNSET:
        values["display_description"] = wanted.description
    if not values:
        raise Invalid("server.nothing_to_update", "Invalid input: the server has nothing to update")
    instance = await find(call)
    updated = await call.services.compute.update_server(call.context, instance.uuid, scope_of(call), values)
    kept = {key: value for key, value in full_view(call, updated).items() if not key.startswith(_NOT_IN_UPDATED)}
    return answer({"server": kept | {"addresses": _plain_addresses(updated)}})


_NOT_IN_UPDATED = ("OS-EXT-", "OS-SRV-USG:", "os-extended-volumes:", "config_drive", "key_name", "host_status")
"""Keys that the answer to an update has from 2.75 on."""


async def delete(call: Call) -> Answer:
    """`DELETE /servers/{server_id}`"""
    uuid = await owned_id(call)
    await call.services.compute.delete_server(call.context, uuid, scope_of(call))
    return Answer(204)


_RULE = "os_compute_api:servers:"
ROUTES = (
    Route("GET", "/servers/detail", list_details, _RULE + "detail"),
    Route("GET", "/servers/{server_id}", show, _RULE + "show"),
    Route("PUT", "/servers/{server_id}", update, _RULE + "update"),
    Route("DELETE", "/servers/{server_id}", delete, _RULE + "delete"),
    Route("GET", "/servers", list_summaries, _RULE + "index"),
    Route("POST", "/servers", create, _RULE + "create"),
    Route("GET", "/servers/{server_id}/ips", list_addresses, "os_compute_api:ips:index"),
    Route("GET", "/servers/{server_id}/ips/{network}", show_addresses, "os_compute_api:ips:show"),
)
