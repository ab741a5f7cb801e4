"""A server's metadata: `/servers/{server_id}/metadata`."""

from typing import Annotated

from msgspec import Meta

from cellway.errors import Invalid, NotFound
from cellway.http.routes import Route
from cellway.http.servers import find, scope_of
from cellway.http.wire import Answer, Body, Call, Metadata, answer


class MetadataBody(Body, frozen=True):
    """`POST` and `PUT` of all metadata."""

    metadata: Metadata


class ItemBody(Body, frozen=True):
    """`PUT` of one key."""

    meta: Annotated[Metadata, Meta(min_length=1, max_length=1)]


async def index(call: Call) -> Answer:
    """`GET …/metadata`"""
    return answer({"metadata": (await find(call)).metadata})


async def show(call: Call) -> Answer:
    """`GET …/metadata/{key}`"""
    key = call.path["key"]
    metadata = (await find(call)).metadata
    if key not in metadata:
        raise NotFound("metadata.not_found", "Metadata item was not found", key=key)
    return answer({"meta": {key: metadata[key]}})


async def merge(call: Call) -> Answer:
    """`POST …/metadata`"""
    return await _set(call, replace=False)


async def replace_all(call: Call) -> Answer:
    """`PUT …/metadata`"""
    return await _set(call, replace=True)


async def _set(call: Call, *, replace: bool) -> Answer:
    items = call.decode(MetadataBody).metadata
    uuid = (await find(call)).uuid
    merged = await call.services.compute.merge_metadata(call.context, uuid, scope_of(call), items, replace=replace)
    return answer({"metadata": merged})


async def set_one(call: Call) -> Answer:
    """`PUT …/metadata/{key}`"""
    items = call.decode(ItemBody).meta
    if call.path["key"] not in items:
        raise Invalid("metadata.key_mismatch", "Request body and URI mismatch")
    uuid = (await find(call)).uuid
    await call.services.compute.merge_metadata(call.context, uuid, scope_of(call), items, replace=False)
    return answer({"meta": items})


async def delete(call: Call) -> Answer:
    """`DELETE …/metadata/{key}`"""
    uuid = (await find(call)).uuid
    await call.services.compute.delete_metadata(call.context, uuid, scope_of(call), call.path["key"])
    return Answer(204)


_ALL = "/servers/{server_id}/metadata"
_ONE = "/servers/{server_id}/metadata/{key}"
_RULE = "os_compute_api:server-metadata:"
ROUTES = (
    Route("GET", _ALL, index, _RULE + "index"),
    Route("POST", _ALL, merge, _RULE + "create"),
    Route("PUT", _ALL, replace_all, _RULE + "update_all"),
    Route("GET", _ONE, show, _RULE + "show"),
    Route("PUT", _ONE, set_one, _RULE + "update"),
    Route("DELETE", _ONE, delete, _RULE + "delete"),
)
