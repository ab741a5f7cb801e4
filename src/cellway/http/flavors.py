"""Flavors over HTTP: list, show, create, delete, who has access, extra specs.

Handlers call the nouns of `cellway.flavors` on the API database; `http/app.py` takes ROUTES. Later microversions than
those advertised are written out where they are one comparison. Seed: none of its own.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from cellway import flavors
from cellway.errors import Invalid
from cellway.flavors import Flavor
from cellway.http.routes import Route
from cellway.http.wire import INT_MAX, Answer, Body, Call, Description, Name, answer, boolean, integer

# ---- bodies ----------------------------------------------------------------------------------------------------

_Digits = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,10}\Z")]
_Whole = Annotated[int, msgspec.Meta(ge=0, le=INT_MAX)] | _Digits
_Positive = Annotated[int, msgspec.Meta(ge=1, le=INT_MAX)] | _Digits
_FLOAT_MAX = 3.40282e38
_Factor = (
    Annotated[float, msgspec.Meta(gt=0, le=_FLOAT_MAX)]
    | Annotated[str, msgspec.Meta(max_length=40, pattern=r"^[0-9]+(\.[0-9]+)?\Z")]
)
_FlavorId = (
    Annotated[str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^(?! )[a-zA-Z0-9. _-]+(?<! )\Z")]
    | Annotated[int, msgspec.Meta(ge=0, le=INT_MAX)]
    | None
)
_SpecKey = Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9_:. -]{1,255}\Z")]
_SpecValue = (
    Annotated[str, msgspec.Meta(max_length=255)]
    | Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    | float
    | bool
)
_Specs = dict[_SpecKey, _SpecValue]


class _NewFlavor(Body, frozen=True, kw_only=True):
    name: Name
    ram: _Positive
    vcpus: _Positive
    disk: _Whole
    id: _FlavorId = None
    swap: _Whole = 0
    ephemeral: _Whole = msgspec.field(name="OS-FLV-EXT-DATA:ephemeral", default=0)
    is_public: bool | str = msgspec.field(name="os-flavor-access:is_public", default=True)
    rxtx_factor: _Factor = 1.0


class _NewFlavor255(_NewFlavor, frozen=True, kw_only=True):
    description: Description | None = None


class _NewDescription(Body, frozen=True):
    description: Description | None


New = TypeVar("New", _NewFlavor, _NewFlavor255, _NewDescription)


class _Flavor(Body, Generic[New], frozen=True):
    flavor: New


class _Tenant(Body, frozen=True):
    tenant: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class _Action(Body, frozen=True):
    add: _Tenant | msgspec.UnsetType = msgspec.field(name="addTenantAccess", default=msgspec.UNSET)
    remove: _Tenant | msgspec.UnsetType = msgspec.field(name="removeTenantAccess", default=msgspec.UNSET)


class _ExtraSpecs(Body, frozen=True):
    extra_specs: _Specs


def _whole(value: int | str, name: str, least: int = 0) -> int:
    number = integer(value, name) if isinstance(value, str) else value
    if number < least:
        raise Invalid("request.bad_parameter", f"{name} must be at least {least}", parameter=name)
    return number


def _factor(value: float | str) -> float:
    number = float(value)
    if not 0 < number <= _FLOAT_MAX:
        raise Invalid("request.bad_parameter", f"rxtx_factor must be above 0 and at most {_FLOAT_MAX}")
    return number


def _texts(specs: _Specs) -> dict[str, str]:
    return {key: str(value) for key, value in specs.items()}


# ---- views -----------------------------------------------------------------------------------------------------


def _brief(call: Call, flavor: Flavor) -> dict[str, Any]:
    view: dict[str, Any] = {"id": flavor.flavorid, "name": flavor.name, "links": call.links("flavors", flavor.flavorid)}
    if call.version >= 55:
        view["description"] = flavor.description
    return view


def _full(call: Call, flavor: Flavor) -> dict[str, Any]:
    view = _brief(call, flavor) | {
        "ram": flavor.memory_mb,
        "disk": flavor.root_gb,
        "swap": flavor.swap or (0 if call.version >= 75 else ""),
        "OS-FLV-EXT-DATA:ephemeral": flavor.ephemeral_gb,
        "OS-FLV-DISABLED:disabled": flavor.disabled,
        "vcpus": flavor.vcpus,
        "os-flavor-access:is_public": flavor.is_public,
        "rxtx_factor": flavor.rxtx_factor or "",
    }
    if call.version >= 61 and call.allows("os_compute_api:os-flavor-extra-specs:index"):
        view["extra_specs"] = flavor.extra_specs
    return view


# ---- flavors ---------------------------------------------------------------------------------------------------


def _is_admin(call: Call) -> bool:
    return call.allows("context_is_admin")


async def _get(call: Call) -> Flavor:
    return await call.services.api.read(
        flavors.get, call.path["id"], project_id=call.context.project_id, all_projects=_is_admin(call)
    )


async def _list(call: Call) -> tuple[Sequence[Flavor], int]:
    """Return the page of flavors that the query asks for, and the page's size."""
    page = call.page()
    admin = _is_admin(call)
    query = call.query
    found = await call.services.api.read(
        flavors.list,
        project_id=call.context.project_id,
        all_projects=admin,
        limit=page.limit,
        marker=page.marker,
        # The others see what they may use, whatever they ask for.
        is_public=_is_public(query.get("is_public")) if admin else True,
        min_ram=integer(query.get("minRam", "0"), "minRam"),
        min_disk=integer(query.get("minDisk", "0"), "minDisk"),
        sort_key=query.get("sort_key", "flavorid"),
        sort_dir=query.get("sort_dir", "asc"),
    )
    return found, page.limit


def _is_public(text: str | None) -> bool | None:
    if text is None:
        return True
    return None if text.lower() == "none" else boolean(text, "is_public")


async def index(call: Call) -> Answer:
    """List the flavors that the caller may use: ids and names."""
    found, limit = await _list(call)
    return _collection(call, "flavors", [_brief(call, flavor) for flavor in found], limit)


async def detail(call: Call) -> Answer:
    """List the flavors that the caller may use, with their sizes."""
    found, limit = await _list(call)
    return _collection(call, "flavors/detail", [_full(call, flavor) for flavor in found], limit)


def _collection(call: Call, path: str, views: list[dict[str, Any]], limit: int) -> Answer:
    body: dict[str, Any] = {"flavors": views}
    links = call.next_links(path, [view["id"] for view in views], limit)
    return answer(body | {"flavors_links": links} if links else body)


async def show(call: Call) -> Answer:
    """Show one flavor."""
    return answer({"flavor": _full(call, await _get(call))})


async def create(call: Call) -> Answer:
    """Add a flavor; without an id it gets a uuid."""
    new: _NewFlavor
    description = None
    if call.version >= 55:
        new = described = call.decode(_Flavor[_NewFlavor255]).flavor
        description = described.description
    else:
        new = call.decode(_Flavor[_NewFlavor]).flavor
    flavor = await call.services.api.write_once(
        None,
        flavors.create,
        flavorid=call.services.ids.uuid() if new.id is None else str(new.id),
        name=new.name,
        memory_mb=_whole(new.ram, "ram", 1),
        vcpus=_whole(new.vcpus, "vcpus", 1),
        root_gb=_whole(new.disk, "disk"),
        ephemeral_gb=_whole(new.ephemeral, "OS-FLV-EXT-DATA:ephemeral"),
        swap=_whole(new.swap, "swap"),
        rxtx_factor=_factor(new.rxtx_factor),
        is_public=boolean(str(new.is_public), "os-flavor-access:is_public"),
        description=description,
    )
    return answer({"flavor": _full(call, flavor)})


async def update(call: Call) -> Answer:
    """Change a flavor's description."""
    new = call.decode(_Flavor[_NewDescription]).flavor
    flavor = await call.services.api.write_once(None, flavors.update_description, call.path["id"], new.description)
    return answer({"flavor": _full(call, flavor)})


async def delete(call: Call) -> Answer:
    """Remove a flavor; the servers made with it keep their copy."""
    await call.services.api.write_once(None, flavors.delete, call.path["id"])
    return Answer(202)


# ---- access ----------------------------------------------------------------------------------------------------


def _access(flavorid: str, projects: Sequence[str]) -> Answer:
    return answer({"flavor_access": [{"flavor_id": flavorid, "tenant_id": project} for project in projects]})


async def list_access(call: Call) -> Answer:
    """List the projects that may use a private flavor."""
    flavorid = call.path["id"]
    return _access(flavorid, await call.services.api.read(flavors.list_access, flavorid))


async def act(call: Call) -> Answer:
    """Give a project access to a private flavor, or take it back."""
    flavorid, write = call.path["id"], call.services.api.write
    match call.decode(_Action):
        case _Action(add=_Tenant(tenant=project), remove=msgspec.UNSET):
            call.require(rule="os_compute_api:os-flavor-access:add_tenant_access")
            projects = await write(flavors.add_access, flavorid, project, public_too=call.version < 7)
        case _Action(add=msgspec.UNSET, remove=_Tenant(tenant=project)):
            call.require(rule="os_compute_api:os-flavor-access:remove_tenant_access")
            projects = await write(flavors.remove_access, flavorid, project)
        case _:
            raise Invalid("request.invalid", "Invalid input: one of addTenantAccess and removeTenantAccess is expected")
    return _access(flavorid, projects)


# ---- extra specs -----------------------------------------------------------------------------------------------


async def list_specs(call: Call) -> Answer:
    """List a flavor's extra specs."""
    return answer({"extra_specs": (await _get(call)).extra_specs})


async def show_spec(call: Call) -> Answer:
    """Show one extra spec."""
    key = call.path["key"]
    value = await call.services.api.read(
        flavors.get_extra_spec,
        call.path["id"],
        key,
        project_id=call.context.project_id,
        all_projects=_is_admin(call),
    )
    return answer({key: value})


async def set_specs(call: Call) -> Answer:
    """Add extra specs to a flavor's own."""
    specs = _texts(call.decode(_ExtraSpecs).extra_specs)
    await call.services.api.write_once(None, flavors.set_extra_specs, call.path["id"], specs)
    return answer({"extra_specs": specs})


async def set_spec(call: Call) -> Answer:
    """Set one extra spec."""
    specs = _texts(call.decode(_Specs))
    if specs.keys() != {call.path["key"]}:
        raise Invalid("flavor.extra_spec_mismatch", "Request body and URI mismatch")
    await call.services.api.write_once(None, flavors.set_extra_specs, call.path["id"], specs)
    return answer(specs)


async def delete_spec(call: Call) -> Answer:
    """Remove one extra spec."""
    await call.services.api.write_once(None, flavors.delete_extra_spec, call.path["id"], call.path["key"])
    return Answer(200)


_ANY = "os_compute_api:flavors"
_MANAGE = "os_compute_api:os-flavor-manage"
_SPECS = "os_compute_api:os-flavor-extra-specs"

ROUTES = (
    Route("GET", "/flavors", index, _ANY),
    Route("GET", "/flavors/detail", detail, _ANY),
    Route("GET", "/flavors/{id}", show, _ANY),
    Route("POST", "/flavors", create, f"{_MANAGE}:create"),
    Route("PUT", "/flavors/{id}", update, f"{_MANAGE}:update", since=55),
    Route("DELETE", "/flavors/{id}", delete, f"{_MANAGE}:delete"),
    Route("GET", "/flavors/{id}/os-flavor-access", list_access, "os_compute_api:os-flavor-access"),
    # Which of two rules it needs is known when the body is read.
    Route("POST", "/flavors/{id}/action", act, _ANY),
    Route("GET", "/flavors/{id}/os-extra_specs", list_specs, f"{_SPECS}:index"),
    Route("POST", "/flavors/{id}/os-extra_specs", set_specs, f"{_SPECS}:create"),
    Route("GET", "/flavors/{id}/os-extra_specs/{key}", show_spec, f"{_SPECS}:show"),
    Route("PUT", "/flavors/{id}/os-extra_specs/{key}", set_spec, f"{_SPECS}:update"),
    Route("DELETE", "/flavors/{id}/os-extra_specs/{key}", delete_spec, f"{_SPECS}:delete"),
)
