"""Quota sets of projects and users, and quota classes, over HTTP: `/os-quota-sets` and `/os-quota-class-sets`.

Handlers call the verbs of `compute/limits.py`; `http/app.py` takes ROUTES. Which limits are shown and taken depends on
the microversion: those of the network service until 2.35, injected files until 2.56, and server groups in a class from
2.50. Seed 003.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec

from cellway.errors import Invalid
from cellway.http.routes import Route
from cellway.http.wire import Answer, Body, Call, answer, boolean
from cellway.quota.limits import MOST, NETWORK, RESOURCES
from cellway.quota.usage import Usage

_INJECTED = ("injected_files", "injected_file_content_bytes", "injected_file_path_bytes")
_GROUPS = ("server_groups", "server_group_members")
_NAME_MOST = 255


def _shown(call: Call) -> list[str]:
    """Return the resources that a quota set of this microversion has."""
    hidden = {*(NETWORK if call.version >= 36 else ()), *(_INJECTED if call.version >= 57 else ())}
    return [resource for resource in RESOURCES if resource not in hidden]


def _shown_of_class(call: Call) -> list[str]:
    hidden = {*(NETWORK if call.version >= 50 else _GROUPS), *(_INJECTED if call.version >= 57 else ())}
    return [resource for resource in RESOURCES if resource not in hidden]


# ---- bodies ----------------------------------------------------------------------------------------------------

_Number = Annotated[int, msgspec.Meta(ge=-1, le=MOST)]
_Word = Annotated[str, msgspec.Meta(max_length=_NAME_MOST)]
_IS_NUMBER = re.compile(r"-?[0-9]{1,10}")


class _QuotaSet(Body, frozen=True):
    quota_set: dict[str, _Number | _Word | bool]


class _QuotaClassSet(Body, frozen=True):
    quota_class_set: dict[str, _Number | _Word]


def _limits(given: Mapping[str, int | str | bool], known: Iterable[str]) -> dict[str, int]:
    """Return the limits in a body, where a number may be written as text. Raises: Invalid."""
    wanted: dict[str, int] = {}
    for resource, limit in given.items():
        if resource not in known or isinstance(limit, bool) or not _IS_NUMBER.fullmatch(str(limit)):
            raise Invalid("request.invalid", f"Invalid input: {resource} has no limit here, or not this one")
        wanted[resource] = int(limit)
    return wanted


# ---- handlers --------------------------------------------------------------------------------------------------


async def _project(call: Call) -> str:
    """Return the project that is meant. Raises: Forbidden; Invalid for one that does not exist."""
    project_id = call.path["project"]
    call.require(project_id=project_id)
    if not await call.services.projects.has_project(project_id):
        raise Invalid("quota.no_project", f"Project ID {project_id} is not a valid project.", project=project_id)
    return project_id


def _user(call: Call) -> str | None:
    user_id = call.query.get("user_id") or None
    if user_id is not None and len(user_id) > _NAME_MOST:
        raise Invalid("request.bad_parameter", f"user_id has {_NAME_MOST} characters at most", parameter="user_id")
    return user_id


async def show(call: Call) -> Answer:
    """Show the limits of a project, or of a user in it."""
    project, user = await _project(call), _user(call)
    allowed = await call.services.quotas.allowed(call.context, project, user or "")
    return _answer(call, project, allowed.user)


async def defaults(call: Call) -> Answer:
    """Show what a project has that has no limits of its own."""
    project = await _project(call)
    return _answer(call, project, await call.services.quotas.class_limits(call.context))


def _answer(call: Call, project: str | None, limits: Mapping[str, int]) -> Answer:
    view: dict[str, Any] = {} if project is None else {"id": project}
    return answer({"quota_set": view | {resource: limits[resource] for resource in _shown(call)}})


async def detail(call: Call) -> Answer:
    """Show limits, with what is in use and reserved of each."""
    project, user = await _project(call), _user(call)
    allowed = await call.services.quotas.allowed(call.context, project, user or "")
    used = await call.services.quotas.usage(call.context, project, user)
    view: dict[str, Any] = {"id": project}
    for resource in _shown(call):
        has = used.get(resource, Usage())
        view[resource] = {"limit": allowed.user[resource], "in_use": has.in_use, "reserved": has.reserved}
    return answer({"quota_set": view})


async def update(call: Call) -> Answer:
    """Set limits of a project, or of a user in it: all that are given, or none."""
    project, user = await _project(call), _user(call)
    given = dict(call.decode(_QuotaSet).quota_set)
    force = boolean(str(given.pop("force", False)), "force")
    wanted = _limits(given, _shown(call))
    allowed = await call.services.quotas.set_limits(call.context, project, user, wanted, force=force)
    return _answer(call, None, allowed.user)


async def delete(call: Call) -> Answer:
    """Remove the limits of a project and of all its users, or of one user."""
    project, user = await _project(call), _user(call)
    await call.services.quotas.delete_limits(project, user)
    return Answer(202)


async def show_class(call: Call) -> Answer:
    """Show the limits of a quota class."""
    name = _class(call)
    limits = await call.services.quotas.class_limits(call.context, name)
    return answer(
        {"quota_class_set": {"id": name} | {resource: limits[resource] for resource in _shown_of_class(call)}}
    )


async def update_class(call: Call) -> Answer:
    """Set limits of a quota class. `default` is the one that is in force for every project."""
    name = _class(call)
    wanted = _limits(call.decode(_QuotaClassSet).quota_class_set, _shown_of_class(call))
    limits = await call.services.quotas.set_class_limits(call.context, name, wanted)
    return answer({"quota_class_set": {resource: limits[resource] for resource in _shown_of_class(call)}})


def _class(call: Call) -> str:
    name = call.path["name"]
    if len(name) > _NAME_MOST:
        raise Invalid("request.invalid", f"The name of a class has {_NAME_MOST} characters at most")
    return name


_RULE = "os_compute_api:os-quota-sets"
_CLASS_RULE = "os_compute_api:os-quota-class-sets"

ROUTES = (
    Route("GET", "/os-quota-sets/{project}", show, f"{_RULE}:show"),
    Route("PUT", "/os-quota-sets/{project}", update, f"{_RULE}:update"),
    Route("DELETE", "/os-quota-sets/{project}", delete, f"{_RULE}:delete"),
    Route("GET", "/os-quota-sets/{project}/defaults", defaults, f"{_RULE}:defaults"),
    Route("GET", "/os-quota-sets/{project}/detail", detail, f"{_RULE}:detail"),
    Route("GET", "/os-quota-class-sets/{name}", show_class, f"{_CLASS_RULE}:show"),
    Route("PUT", "/os-quota-class-sets/{name}", update_class, f"{_CLASS_RULE}:update"),
)
