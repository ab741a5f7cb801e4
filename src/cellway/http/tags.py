"""A server's tags, from 2.26: `/servers/{server_id}/tags`."""

from typing import Annotated
from urllib.parse import quote

import msgspec
from msgspec import Meta

from cellway.errors import Invalid, NotFound
from cellway.http.routes import Route
from cellway.http.servers import Tag, find, scope_of
from cellway.http.wire import Answer, Body, Call, answer


class TagsBody(Body, frozen=True):
    """`PUT …/tags`"""

    tags: Annotated[list[Tag], Meta(max_length=50)]


async def index(call: Call) -> Answer:
    """`GET …/tags`"""
    return answer({"tags": (await find(call)).tags})


async def show(call: Call) -> Answer:
    """`GET …/tags/{tag}`"""
    tag = call.path["tag"]
    instance = await find(call)
    if tag not in instance.tags:
        raise NotFound("tag.not_found", f"Server {instance.uuid} has no tag '{tag}'", tag=tag)
    return Answer(204)


async def replace_all(call: Call) -> Answer:
    """`PUT …/tags`"""
    wanted = call.decode(TagsBody).tags
    uuid = (await find(call)).uuid
    return answer({"tags": await call.services.compute.replace_tags(call.context, uuid, scope_of(call), wanted)})


async def add(call: Call) -> Answer:
    """`PUT …/tags/{tag}`"""
    try:
        tag = msgspec.convert(call.path["tag"], Tag)
    except msgspec.ValidationError as error:
        raise Invalid("tag.invalid", "A tag has 1 to 60 characters, and no comma or slash") from error
    uuid = (await find(call)).uuid
    if await call.services.compute.add_tag(call.context, uuid, scope_of(call), tag):
        location = f"{call.services.compute_url}/servers/{uuid}/tags/{quote(tag, safe='')}"
        return Answer(201, b"", (("Location", location),))
    return Answer(204)


async def delete(call: Call) -> Answer:
    """`DELETE …/tags/{tag}`"""
    uuid = (await find(call)).uuid
    await call.services.compute.delete_tag(call.context, uuid, scope_of(call), call.path["tag"])
    return Answer(204)


async def delete_all(call: Call) -> Answer:
    """`DELETE …/tags`"""
    uuid = (await find(call)).uuid
    await call.services.compute.replace_tags(call.context, uuid, scope_of(call), ())
    return Answer(204)


_ALL = "/servers/{server_id}/tags"
_ONE = "/servers/{server_id}/tags/{tag}"
_RULE = "os_compute_api:os-server-tags:"
ROUTES = (
    Route("GET", _ALL, index, _RULE + "index", since=26),
    Route("PUT", _ALL, replace_all, _RULE + "update_all", since=26),
    Route("DELETE", _ALL, delete_all, _RULE + "delete_all", since=26),
    Route("GET", _ONE, show, _RULE + "show", since=26),
    Route("PUT", _ONE, add, _RULE + "update", since=26),
    Route("DELETE", _ONE, delete, _RULE + "delete", since=26),
)
