"""Server groups over HTTP: list, show, create, delete.

Handlers call the noun `cellway.server_groups` on the API database; `http/app.py` takes ROUTES. A group of another
project is none, but for an admin. Seed: none of its own.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from cellway import server_groups
from cellway.errors import Invalid
from cellway.http.routes import Route
from cellway.http.wire import INT_MAX, Answer, Body, Call, Name, answer, integer
from cellway.ids import is_uuid
from cellway.server_groups import Policy, ServerGroup, not_found

# ---- bodies ----------------------------------------------------------------------------------------------------

_Number = Annotated[int, Meta(ge=1, le=INT_MAX)] | Annotated[str, Meta(pattern=r"^0*[1-9][0-9]{0,8}\Z", max_length=16)]


class _New(Body, frozen=True):
    name: Name
    policies: tuple[Literal["anti-affinity", "affinity"]]


class _New15(Body, frozen=True):
    name: Name
    policies: tuple[Policy]


class _Rules(Body, frozen=True):
    max_server_per_host: _Number | UnsetType = UNSET


class _New64(Body, frozen=True):
    name: Name
    policy: Policy
    rules: _Rules = _Rules()


class _Group(Body, frozen=True):
    server_group: _New


class _Group15(Body, frozen=True):
    server_group: _New15


class _Group64(Body, frozen=True):
    server_group: _New64


# ---- views -----------------------------------------------------------------------------------------------------


def _view(call: Call, group: ServerGroup) -> dict[str, Any]:
    view: dict[str, Any] = {"id": group.uuid, "name": group.name, "members": group.members}
    if call.version >= 64:
        most = group.max_server_per_host
        view |= {"policy": group.policy, "rules": {} if most is None else {"max_server_per_host": most}}
    else:
        # Metadata were never more than an empty object.
        view |= {"policies": [group.policy] if group.policy else [], "metadata": {}}
    if call.version >= 13:
        view |= {"project_id": group.project_id, "user_id": group.user_id}
    return view


# ---- handlers --------------------------------------------------------------------------------------------------


async def _find(call: Call) -> ServerGroup:
    """Return the group that the path names, once the policy lets the caller at it. Raises: NotFound, Forbidden."""
    uuid = call.path["id"]
    if not is_uuid(uuid):
        raise not_found(uuid[:255])
    group = await call.services.api.read(server_groups.get, uuid.lower())
    if group.project_id != call.context.project_id and not call.allows("context_is_admin"):
        raise not_found(uuid.lower())
    call.require(project_id=group.project_id)
    return group


async def index(call: Call) -> Answer:
    """List the project's groups, or for an admin everybody's."""
    everybody = "all_projects" in call.query and call.allows("os_compute_api:os-server-groups:index:all_projects")
    found = await call.services.api.read(
        server_groups.list,
        None if everybody else call.context.project_id,
        limit=call.page().limit,
        offset=integer(call.query.get("offset", "0"), "offset"),
    )
    return answer({"server_groups": [_view(call, group) for group in found]})


async def show(call: Call) -> Answer:
    """Show one group."""
    return answer({"server_group": _view(call, await _find(call))})


async def create(call: Call) -> Answer:
    """Make a group."""
    policy: Policy
    most = None
    if call.version >= 64:
        new = call.decode(_Group64).server_group
        name, policy, limit = new.name, new.policy, new.rules.max_server_per_host
        if limit is not UNSET:
            if policy != "anti-affinity":
                raise Invalid("server_group.rules", "Only anti-affinity policy supports rules.")
            most = int(limit)
    else:
        old = call.decode(_Group15).server_group if call.version >= 15 else call.decode(_Group).server_group
        name, (policy,) = old.name, old.policies
    group = await call.services.quotas.take(
        call.context,
        "server_groups",
        (call.context.project_id, call.context.user_id),
        server_groups.create,
        call.services.ids.uuid(),
        project_id=call.context.project_id,
        user_id=call.context.user_id,
        name=name,
        policy=policy,
        max_server_per_host=most,
    )
    return answer({"server_group": _view(call, group)})


async def delete(call: Call) -> Answer:
    """Remove a group; its servers stay."""
    group = await _find(call)
    owner = group.project_id, group.user_id
    await call.services.quotas.give_back("server_groups", owner, server_groups.delete, group.uuid)
    return Answer(204)


_RULE = "os_compute_api:os-server-groups"

ROUTES = (
    Route("GET", "/os-server-groups", index, f"{_RULE}:index"),
    Route("POST", "/os-server-groups", create, f"{_RULE}:create"),
    Route("GET", "/os-server-groups/{id}", show, f"{_RULE}:show"),
    Route("DELETE", "/os-server-groups/{id}", delete, f"{_RULE}:delete"),
)
