"""Compute services over HTTP: list, enable, disable, force down, delete.

Handlers call `compute/host_api.py`; `http/app.py` takes ROUTES. Agents are the only services that the API shows:
conductors and builders cannot be disabled. Ids are a cell's own numbers before 2.53, so one may name services of
several cells; it is then refused and never guessed. Seed: none of its own.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from cellway.compute.host_api import HostInCell
from cellway.errors import Invalid, NotFound
from cellway.hosts import COMPUTE_BINARY
from cellway.http.routes import Route
from cellway.http.wire import Answer, Body, Call, Name, answer, boolean, integer, long_stamp
from cellway.ids import is_uuid

# ---- bodies ----------------------------------------------------------------------------------------------------

_Reason = Annotated[str, Meta(min_length=1, max_length=255)]


class _ByHost(Body, frozen=True, kw_only=True):
    host: Name
    binary: Name
    disabled_reason: _Reason | UnsetType = UNSET


class _ByHost11(_ByHost, frozen=True, kw_only=True):
    forced_down: bool | str | UnsetType = UNSET


class _Update(Body, frozen=True, kw_only=True):
    status: Literal["enabled", "disabled"] | UnsetType = UNSET
    disabled_reason: _Reason | UnsetType = UNSET
    forced_down: bool | str | UnsetType = UNSET


def _truth(value: bool | str) -> bool:
    return boolean(value, "forced_down") if isinstance(value, str) else value


# ---- views -----------------------------------------------------------------------------------------------------


def condition(host: HostInCell) -> dict[str, str]:
    """Return what a service and its hypervisor say alike of a host's state."""
    return {"state": "up" if host.up else "down", "status": "disabled" if host.row.disabled else "enabled"}


def _view(call: Call, host: HostInCell) -> dict[str, Any]:
    row = host.row
    view: dict[str, Any] = {
        "id": row.service_uuid if call.version >= 53 else row.service_id,
        "binary": COMPUTE_BINARY,
        "host": row.host,
        "zone": host.zone,
        **condition(host),
        "updated_at": long_stamp(row.service_updated_at),
        "disabled_reason": row.disabled_reason,
    }
    if call.version >= 11:
        view["forced_down"] = row.forced_down
    return view


# ---- handlers --------------------------------------------------------------------------------------------------


def only(found: Sequence[HostInCell], what: str, key: str) -> HostInCell:
    """Return the one host that was found for `key`.

    Raises: NotFound for none; Invalid for several, since a number means something only within one cell.
    """
    if not found:
        raise NotFound("host.not_found", f"{what} {key} could not be found.", key=key)
    if len(found) > 1:
        raise Invalid(
            "host.ambiguous",
            f"{what} {key} exists in several cells; use microversion 2.53 or later, where ids are uuids",
            key=key,
        )
    return found[0]


async def _by_id(call: Call) -> HostInCell:
    key = call.path["id"]
    if call.version < 53:
        key = str(integer(key, "id"))
    elif not is_uuid(key):
        raise Invalid("request.bad_id", f"Invalid uuid {key}")
    # Before 2.53 two cells may use one number, so that the answer of each counts.
    found = await _fitting(call, lambda host: str(_view(call, host)["id"]) == key, complete=call.version < 53)
    return only(found, "Service", key)


async def _fitting(call: Call, fits: Callable[[HostInCell], bool], *, complete: bool = False) -> list[HostInCell]:
    """Return the hosts that fit. Raises: CellUnavailable when none does and a cell did not answer."""
    hosts = await call.services.hosts.list_hosts(call.context, complete=complete)
    found = [host for host in hosts if fits(host)]
    if not found and not complete:
        return await _fitting(call, fits, complete=True)
    return found


async def index(call: Call) -> Answer:
    """List services."""
    name, binary = call.query.get("host"), call.query.get("binary")
    hosts = await call.services.hosts.list_hosts(call.context) if binary in (None, "", COMPUTE_BINARY) else []
    return answer({"services": [_view(call, host) for host in hosts if not name or host.row.host == name]})


async def act(call: Call) -> Answer:
    """Enable or disable a service, or force it down, by host and binary. The path says which."""
    action = call.path["id"]
    body = call.decode(_ByHost11) if call.version >= 11 else call.decode(_ByHost)
    shown: dict[str, Any]
    changes: dict[str, Any]
    match action, body:
        case "enable", _:
            shown, changes = {"status": "enabled"}, {"disabled": False, "disabled_reason": None}
        case "disable", _:
            shown, changes = {"status": "disabled"}, {"disabled": True, "disabled_reason": None}
        case "disable-log-reason", _:
            if body.disabled_reason is UNSET:
                raise Invalid("service.no_reason", "Missing disabled reason field")
            shown = {"status": "disabled", "disabled_reason": body.disabled_reason}
            changes = {"disabled": True, "disabled_reason": body.disabled_reason}
        case "force-down", _ByHost11(forced_down=forced):
            if forced is UNSET:
                raise Invalid("service.no_forced_down", "Missing forced_down field")
            shown = changes = {"forced_down": _truth(forced)}
        case _:
            raise NotFound("service.no_such_action", "Unknown action")
    known = body.binary == COMPUTE_BINARY
    found = await _fitting(call, lambda host: host.row.host == body.host) if known else []
    host = only(found, "Service", f"{body.binary} on host {body.host}")
    await call.services.hosts.update_service(call.context, host, changes)
    return answer({"service": {"host": body.host, "binary": body.binary, **shown}})


async def update(call: Call) -> Answer:
    """Enable or disable a service, or force it down, by its uuid."""
    body = call.decode(_Update)
    if body.disabled_reason is not UNSET and body.status != "disabled":
        raise Invalid("service.reason_alone", "Specifying disabled_reason requires that status is disabled.")
    changes: dict[str, Any] = {}
    if body.status is not UNSET:
        changes["disabled"] = body.status == "disabled"
        changes["disabled_reason"] = body.disabled_reason if body.disabled_reason is not UNSET else None
    if body.forced_down is not UNSET:
        changes["forced_down"] = _truth(body.forced_down)
    if not changes:
        raise Invalid(
            "service.no_changes", "No updates were requested. Fields 'status' or 'forced_down' should be specified."
        )
    host = await call.services.hosts.update_service(call.context, await _by_id(call), changes)
    return answer({"service": _view(call, host)})


async def delete(call: Call) -> Answer:
    """Remove a service, and its host with it."""
    await call.services.hosts.delete_service(call.context, await _by_id(call))
    return Answer(204)


_RULE = "os_compute_api:os-services"

ROUTES = (
    Route("GET", "/os-services", index, f"{_RULE}:list"),
    Route("PUT", "/os-services/{id}", act, f"{_RULE}:update", until=52),
    Route("PUT", "/os-services/{id}", update, f"{_RULE}:update", since=53),
    Route("DELETE", "/os-services/{id}", delete, f"{_RULE}:delete"),
)
