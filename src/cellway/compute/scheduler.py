"""Choosing hosts: pure functions from the hosts as they are known and a request to an ordered choice.

A filter says whether a host may have the server, a weigher how good it is; both lists are plain and in order.
`compute/fleet.py` supplies the hosts, `compute/build.py` claims the first choice that still has room.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cellway.aggregates import Merged
from cellway.server_groups import Placement


@dataclass(frozen=True, slots=True)
class HostState:
    """What the scheduler knows of a host; amounts that may be promised and those that are."""

    host: str
    cell_id: int
    zone: str
    up: bool
    enabled: bool
    cell_enabled: bool
    cell_answers: bool
    vcpus: int
    memory_mb: int
    disk_gb: int
    vcpus_used: int
    memory_mb_used: int
    disk_gb_used: int
    metadata: Merged = field(default_factory=dict)
    """Of all its aggregates."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a server needs. `zone`, `host` and `cell_ids` are None when any will do, `group` when it is in none.

    `aggregate_specs` is what its flavor asks of the metadata of a host's aggregates.
    """

    vcpus: int
    memory_mb: int
    disk_gb: int
    zone: str | None = None
    host: str | None = None
    cell_ids: frozenset[int] | None = None
    excluded_hosts: frozenset[str] = frozenset()
    group: Placement | None = None
    project_id: str = ""
    aggregate_specs: Mapping[str, str] = field(default_factory=dict)


Filter = Callable[[HostState, Request], bool]


def cell_is_enabled(host: HostState, _request: Request) -> bool:
    """The operator takes builds in this cell."""
    return host.cell_enabled


def cell_answers(host: HostState, _request: Request) -> bool:
    """The cell's database answered when it was last asked."""
    return host.cell_answers


def cell_is_wanted(host: HostState, request: Request) -> bool:
    """The build may be in this cell."""
    return request.cell_ids is None or host.cell_id in request.cell_ids


def host_is_up(host: HostState, _request: Request) -> bool:
    """The agent reports, and the operator takes builds here."""
    return host.up and host.enabled


def host_is_wanted(host: HostState, request: Request) -> bool:
    """The request names this host or none, and it has not failed the request already."""
    return request.host in (None, host.host) and host.host not in request.excluded_hosts


def zone_fits(host: HostState, request: Request) -> bool:
    """The request names this zone or none."""
    return request.zone in (None, host.zone)


def group_allows(host: HostState, request: Request) -> bool:
    """The policy of the server's group lets one more of its members in here."""
    return request.group is None or _allows(request.group, host.host)


def _allows(group: Placement, host: str) -> bool:
    if group.policy == "affinity":
        return not group.hosts or host in group.hosts
    return group.policy != "anti-affinity" or group.hosts.get(host, 0) < group.max_server_per_host


_ISOLATION = "filter_tenant_id"


def aggregates_admit(host: HostState, request: Request) -> bool:
    """The host is in no aggregate that is kept for certain projects, or the request's is one of them."""
    kept = [projects for key, projects in host.metadata.items() if key.startswith(_ISOLATION)]
    return not kept or any(request.project_id in projects for projects in kept)


def aggregates_match(host: HostState, request: Request) -> bool:
    """Each thing that the flavor asks of aggregates is a value that one of the host's gives."""
    return all(
        any(_matches(value, wanted) for value in host.metadata.get(key, ()))
        for key, wanted in request.aggregate_specs.items()
    )


_SCOPE = "aggregate_instance_extra_specs:"


def aggregate_specs(extra_specs: Mapping[str, str]) -> Mapping[str, str]:
    """Return those of a flavor's extra specs that are about aggregates, without their prefix."""
    return {key.removeprefix(_SCOPE): value for key, value in extra_specs.items() if key.startswith(_SCOPE)}


_COMPARISONS: Mapping[str, Callable[[str, str], bool]] = {
    "=": lambda value, wanted: float(value) >= float(wanted),
    "==": lambda value, wanted: float(value) == float(wanted),
    "!=": lambda value, wanted: float(value) != float(wanted),
    ">=": lambda value, wanted: float(value) >= float(wanted),
    "<=": lambda value, wanted: float(value) <= float(wanted),
    "s==": lambda value, wanted: value == wanted,
    "s!=": lambda value, wanted: value != wanted,
    "s>=": lambda value, wanted: value >= wanted,
    "s>": lambda value, wanted: value > wanted,
    "s<=": lambda value, wanted: value <= wanted,
    "s<": lambda value, wanted: value < wanted,
    "<in>": lambda value, wanted: wanted in value,
}
"""The incumbent's operators on one operand. Its `=` means at least."""


def _matches(value: str, wanted: str) -> bool:
    """Tell whether a value is what an extra spec wants: an operator and its operands, or the very text."""
    operator, *operands = wanted.split() or [""]
    if operator == "<or>":
        return value in operands[::2]
    if operator == "<all-in>":
        return bool(operands) and all(operand in value for operand in operands)
    if operator not in _COMPARISONS:
        return value == wanted
    try:
        return bool(operands) and _COMPARISONS[operator](value, operands[0])
    except ValueError:
        # No number, so neither more nor less than one.
        return False


def has_vcpus(host: HostState, request: Request) -> bool:
    """Enough virtual CPUs are left."""
    return host.vcpus_used + request.vcpus <= host.vcpus


def has_memory(host: HostState, request: Request) -> bool:
    """Enough memory is left."""
    return host.memory_mb_used + request.memory_mb <= host.memory_mb


def has_disk(host: HostState, request: Request) -> bool:
    """Enough disk is left."""
    return host.disk_gb_used + request.disk_gb <= host.disk_gb


FILTERS: tuple[tuple[str, Filter], ...] = (
    ("cell enabled", cell_is_enabled),
    ("cell", cell_is_wanted),
    ("host up and enabled", host_is_up),
    ("host", host_is_wanted),
    ("zone", zone_fits),
    ("project isolation of aggregates", aggregates_admit),
    ("extra specs for aggregates", aggregates_match),
    ("server group", group_allows),
    ("vcpus", has_vcpus),
    ("memory", has_memory),
    ("disk", has_disk),
    ("cell that does not answer", cell_answers),
)
"""Name and filter, in order: cheap and selective first; last the one that only time decides."""


def free_share(host: HostState, _request: Request) -> float:
    """The scarcest resource decides: the share of it that is left, 0 to 1."""
    return min(
        1 - host.vcpus_used / max(host.vcpus, 1),
        1 - host.memory_mb_used / max(host.memory_mb, 1),
        1 - host.disk_gb_used / max(host.disk_gb, 1),
    )


def company(host: HostState, request: Request) -> float:
    """How many members of its group the server finds here, if its policy is to seek them; less than none, to shun."""
    if request.group is None:
        return 0.0
    sign = {"soft-affinity": 1.0, "soft-anti-affinity": -1.0}.get(request.group.policy, 0.0)
    return sign * request.group.hosts.get(host.host, 0)


WEIGHERS: tuple[tuple[str, float, Callable[[HostState, Request], float]], ...] = (
    ("free share", 1.0, free_share),
    ("server group", 2.0, company),
)
"""Name, factor and weigher; the sum decides. One member more or less outweighs any share."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The hosts that fit, the best first, and for the others how many each filter removed."""

    hosts: Sequence[HostState]
    removed: Sequence[tuple[str, int]]

    @property
    def waits(self) -> bool:
        """Tell whether some host is kept from the server only by its cell, which may answer again soon."""
        return self.removed[-1][1] > 0

    def why_none(self) -> str:
        """Return one sentence that says what removed the hosts."""
        reasons = [f"{count} by {name}" for name, count in self.removed if count]
        return f"No valid host was found ({', '.join(reasons) if reasons else 'there are no hosts'})."


def choose(hosts: Iterable[HostState], request: Request, dice: random.Random) -> Choice:
    """Return the hosts that pass every filter, the best first; equals in random order, so that builders disperse."""
    left = list(hosts)
    removed: list[tuple[str, int]] = []
    for name, fits in FILTERS:
        before = len(left)
        left = [host for host in left if fits(host, request)]
        removed.append((name, before - len(left)))
    weighed = [
        (sum(factor * weigh(host, request) for _, factor, weigh in WEIGHERS), dice.random(), host) for host in left
    ]
    weighed.sort(key=lambda entry: entry[:2], reverse=True)
    return Choice([host for _, _, host in weighed], removed)


def holds(host: str, before: Placement, now: Placement) -> bool:
    """Tell whether the choice of a host still holds when other members of the group may have got one since.

    A policy that must be kept decides again; one that is best kept wants a new choice, among all hosts.
    """
    return _allows(now, host) and (now == before or not now.policy.startswith("soft-"))
