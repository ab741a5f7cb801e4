"""The scheduler: every host it gives fits the request, every host it leaves out does not, and the best comes first."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellway.compute.scheduler import (
    FILTERS,
    HostState,
    Request,
    aggregate_specs,
    aggregates_match,
    choose,
    company,
    free_share,
    holds,
)
from cellway.server_groups import Placement

NAMES = [f"h{number}" for number in range(6)]
ZONES = ["nova", "east"]
CELLS = [1, 2, 3]
KEYS = ["ssd", "gpu", "filter_tenant_id", "filter_tenant_id2"]
VALUES = ["true", "demo", "2"]
amounts = st.integers(0, 8)


@st.composite
def host_states(draw: st.DrawFn) -> list[HostState]:
    """Some hosts of some cells, with anything used of what they have."""
    return [
        HostState(
            host=name,
            cell_id=draw(st.sampled_from(CELLS)),
            zone=draw(st.sampled_from(ZONES)),
            up=draw(st.booleans()),
            enabled=draw(st.booleans()),
            cell_enabled=draw(st.booleans()),
            cell_answers=draw(st.booleans()),
            vcpus=draw(amounts),
            memory_mb=draw(amounts),
            disk_gb=draw(amounts),
            vcpus_used=draw(amounts),
            memory_mb_used=draw(amounts),
            disk_gb_used=draw(amounts),
            metadata=draw(st.dictionaries(st.sampled_from(KEYS), st.frozensets(st.sampled_from(VALUES), min_size=1))),
        )
        for name in draw(st.lists(st.sampled_from(NAMES), unique=True))
    ]


groups = st.builds(
    Placement,
    policy=st.sampled_from(["affinity", "anti-affinity", "soft-affinity", "soft-anti-affinity", "legacy", ""]),
    max_server_per_host=st.integers(1, 3),
    hosts=st.dictionaries(st.sampled_from(NAMES), st.integers(1, 4), max_size=4),
)
requests = st.builds(
    Request,
    vcpus=amounts,
    memory_mb=amounts,
    disk_gb=amounts,
    zone=st.none() | st.sampled_from(ZONES),
    host=st.none() | st.sampled_from(NAMES),
    cell_ids=st.none() | st.frozensets(st.sampled_from(CELLS)),
    excluded_hosts=st.frozensets(st.sampled_from(NAMES)),
    group=st.none() | groups,
    project_id=st.sampled_from(["demo", "other"]),
    aggregate_specs=st.dictionaries(st.sampled_from(KEYS[:2]), st.sampled_from(VALUES)),
)
EMPTY = HostState("h", 1, "nova", True, True, True, True, 8, 8, 8, 0, 0, 0)
SMALL = Request(1, 1, 1)


def may_have(host: HostState, request: Request) -> bool:
    """Say in one sentence what the filters say one by one."""
    return (
        host.up
        and host.enabled
        and host.cell_enabled
        and host.cell_answers
        and (request.cell_ids is None or host.cell_id in request.cell_ids)
        and (request.zone is None or host.zone == request.zone)
        and (request.host is None or host.host == request.host)
        and host.host not in request.excluded_hosts
        and host.vcpus - host.vcpus_used >= request.vcpus
        and host.memory_mb - host.memory_mb_used >= request.memory_mb
        and host.disk_gb - host.disk_gb_used >= request.disk_gb
        and (request.group is None or keeps(host.host, request.group))
        and all(value in host.metadata.get(key, ()) for key, value in request.aggregate_specs.items())
        and is_open(host, request.project_id)
    )


def is_open(host: HostState, project: str) -> bool:
    """Say whether the host is kept for nobody, or for this project too."""
    kept = {value for key, values in host.metadata.items() if key.startswith("filter_tenant_id") for value in values}
    return not kept or project in kept


def keeps(host: str, group: Placement) -> bool:
    """Say whether one more member here leaves the group as its policy wants it."""
    after = {**group.hosts, host: group.hosts.get(host, 0) + 1}
    match group.policy:
        case "affinity":
            return len(after) == max(1, len(group.hosts))
        case "anti-affinity":
            return after[host] <= group.max_server_per_host
        case _:
            return True


@given(host_states(), requests, st.integers())
def test_exactly_the_hosts_that_fit_are_chosen(hosts: list[HostState], request: Request, seed: int) -> None:
    """No host that lacks anything, is excluded or not wanted is chosen, and no host that fits is left out."""
    chosen = choose(hosts, request, random.Random(seed)).hosts
    assert sorted(host.host for host in chosen) == sorted(host.host for host in hosts if may_have(host, request))


@given(host_states(), requests, st.integers())
def test_the_emptier_host_comes_first(hosts: list[HostState], request: Request, seed: int) -> None:
    """Where a group does not mind, they come in the order of the share of their scarcest resource that is left."""
    chosen = choose(hosts, request, random.Random(seed)).hosts
    order = [(company(host, request), free_share(host, request)) for host in chosen]
    assert order == sorted(order, reverse=True)


@given(host_states(), requests, st.integers())
def test_every_host_is_chosen_or_counted(hosts: list[HostState], request: Request, seed: int) -> None:
    """What the filters removed and what they left are all hosts, and each filter has its line."""
    choice = choose(hosts, request, random.Random(seed))
    assert len(choice.hosts) + sum(count for _, count in choice.removed) == len(hosts)
    assert [name for name, _ in choice.removed] == [name for name, _ in FILTERS]


@given(host_states(), requests, st.integers())
def test_waiting_helps_only_when_a_fitting_host_is_in_a_silent_cell(
    hosts: list[HostState], request: Request, seed: int
) -> None:
    """A choice waits exactly when a host would fit if its cell answered."""
    silent = [host for host in hosts if not host.cell_answers]
    assert choose(hosts, request, random.Random(seed)).waits == any(
        may_have(replace(host, cell_answers=True), request) for host in silent
    )


@given(host_states(), requests, st.integers())
def test_the_same_dice_give_the_same_choice(hosts: list[HostState], request: Request, seed: int) -> None:
    """It is a pure function of what it is given, and changes nothing of it."""
    before = list(hosts)
    assert choose(hosts, request, random.Random(seed)) == choose(hosts, request, random.Random(seed))
    assert hosts == before


@given(st.integers())
def test_equal_hosts_are_dispersed(seed: int) -> None:
    """Of many equal hosts not every builder takes the same one first."""
    hosts = [replace(EMPTY, host=f"h{number}") for number in range(8)]
    dice = random.Random(seed)
    assert len({choose(hosts, SMALL, dice).hosts[0].host for _ in range(64)}) > 1


def test_a_host_that_is_full_to_the_brim_is_full() -> None:
    """The last unit is given, and none after it."""
    last = replace(EMPTY, vcpus_used=7)
    assert choose([last], SMALL, random.Random(0)).hosts == [last]
    assert choose([replace(last, vcpus_used=8)], SMALL, random.Random(0)).hosts == []


def test_the_reason_names_what_removed_the_hosts() -> None:
    """A sentence for the server's owner, with numbers; without hosts it says so."""
    hosts = [replace(EMPTY, host="a", vcpus=0), replace(EMPTY, host="b", up=False), replace(EMPTY, host="c", vcpus=0)]
    why = choose(hosts, SMALL, random.Random(0)).why_none()
    assert why == "No valid host was found (1 by host up and enabled, 2 by vcpus)."
    assert choose([], SMALL, random.Random(0)).why_none() == "No valid host was found (there are no hosts)."


def of_group(policy: str, **hosts: int) -> Request:
    """Return the request of a small server whose group has so many members on these hosts."""
    return replace(SMALL, group=Placement(policy, 1, hosts))


def test_a_soft_policy_outweighs_every_share() -> None:
    """The fuller host is chosen when most of the group is there, and the one with fewer members when it shuns them."""
    full, half, empty = (replace(EMPTY, host=name, vcpus_used=used) for name, used in (("a", 7), ("b", 4), ("c", 0)))
    hosts = [full, half, empty]

    def first(request: Request) -> str:
        return choose(hosts, request, random.Random(0)).hosts[0].host

    assert first(of_group("soft-affinity", a=2, b=1)) == "a"
    assert first(of_group("soft-anti-affinity", c=2, b=1)) == "a"
    assert first(of_group("soft-anti-affinity", c=2, b=1, a=1)) == "b"
    assert first(of_group("anti-affinity", c=1)) == "b"
    assert first(of_group("affinity", a=1)) == "a"


def test_a_policy_that_leaves_no_host_is_the_reason() -> None:
    """The sentence names the group."""
    why = choose([EMPTY], of_group("anti-affinity", h=1), random.Random(0)).why_none()
    assert why == "No valid host was found (1 by server group)."


@given(groups, groups, st.sampled_from(NAMES))
def test_a_choice_holds_as_long_as_the_policy_does(before: Placement, now: Placement, host: str) -> None:
    """A hard policy asks only whether it is kept now; a soft one wants its choice made again when anything changed."""
    soft = now.policy.startswith("soft-")
    assert holds(host, before, now) == (now == before if soft else keeps(host, now))
    assert holds(host, now, now) == keeps(host, now)


@pytest.mark.parametrize(
    ("wanted", "fitting", "others"),
    [
        ("fast", ["fast"], ["Fast", "faster", ""]),
        ("", [""], ["x"]),
        ("= 2", ["2", "2.5", "10"], ["1", "x"]),
        ("== 2", ["2", "2.0"], ["3", "x"]),
        ("!= 2", ["3"], ["2.0", "x"]),
        (">= 10", ["10", "11"], ["9", "x"]),
        ("<= 10", ["9", "10"], ["11", "x"]),
        ("s== b", ["b"], ["a", "bb"]),
        ("s!= b", ["a"], ["b"]),
        ("s> b", ["c", "bb"], ["b", "a"]),
        ("s>= b", ["b", "c"], ["a"]),
        ("s< b", ["a"], ["b", "c"]),
        ("s<= b", ["a", "b"], ["c"]),
        ("<in> b", ["abc"], ["ac"]),
        ("<all-in> a c", ["abc"], ["ab"]),
        ("<or> a <or> b", ["a", "b"], ["c", "<or>", "ab"]),
        ("==", [], ["", "=="]),
        ("== x", [], ["2"]),
    ],
)
def test_an_extra_spec_compares_as_its_operator_says(wanted: str, fitting: list[str], others: list[str]) -> None:
    """Numbers as numbers, texts as texts; what is no number is neither more nor less than one."""
    request = replace(SMALL, aggregate_specs={"key": wanted})
    for value in fitting:
        assert aggregates_match(replace(EMPTY, metadata={"key": frozenset({value})}), request), value
    for value in others:
        assert not aggregates_match(replace(EMPTY, metadata={"key": frozenset({value})}), request), value


def test_one_aggregate_is_enough_for_each_key_and_none_is_not() -> None:
    """A host of several aggregates has all their values; one of no aggregate has what nobody asks for."""
    request = replace(SMALL, aggregate_specs={"tier": "<or> gold <or> silver", "size": ">= 4"})
    metadata = {"tier": frozenset({"bronze", "gold"}), "size": frozenset({"2", "8"})}
    assert aggregates_match(replace(EMPTY, metadata=metadata), request)
    assert not aggregates_match(replace(EMPTY, metadata={"tier": frozenset({"gold"})}), request)
    assert not aggregates_match(EMPTY, request)
    assert aggregates_match(EMPTY, SMALL)


def test_only_extra_specs_of_their_scope_are_about_aggregates() -> None:
    """Others, with another scope or none, are left alone."""
    specs = {"aggregate_instance_extra_specs:ssd": "true", "hw:cpu_policy": "dedicated", "ssd": "false"}
    assert aggregate_specs(specs) == {"ssd": "true"}
