"""Flavors on a real API database: who sees which, pages in every order, extra specs, access, the copy in a server."""

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from cellway import flavors
from cellway.config import Secret
from cellway.db.api_tables import flavor_extra_specs, flavor_projects
from cellway.db.api_tables import flavors as flavors_table
from cellway.db.schema import Tree
from cellway.db.transaction import ApiTx
from cellway.errors import Conflict, Invalid, NotFound
from cellway.flavors import Flavor
from tests.databases import KINDS, Shelf, engine_of, upgraded

NOW = datetime(2026, 3, 1, 12, 30, 15)
SORT_KEYS = (
    *("created_at", "description", "disabled", "ephemeral_gb", "flavorid", "id", "is_public", "memory_mb", "name"),
    *("root_gb", "rxtx_factor", "swap", "updated_at", "vcpu_weight", "vcpus"),
)


@pytest.fixture(scope="module", params=KINDS)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shelf: Shelf
) -> Iterator[sa.Engine]:
    """Give an API database of each kind for the module; every test rolls back what it wrote."""
    if request.param == "sqlite":
        url = upgraded(Secret(f"sqlite:///{tmp_path_factory.mktemp('flavors') / 'api.sqlite'}"), Tree.API)
    else:
        url = shelf.take(request.param, "api")
    made = engine_of(url)
    yield made
    made.dispose()


@pytest.fixture
def tx(engine: sa.Engine) -> Iterator[ApiTx]:
    """Open a transaction that leaves nothing behind."""
    with engine.connect() as connection, connection.begin() as transaction:
        yield ApiTx(connection, NOW)
        transaction.rollback()


def make(tx: ApiTx, flavorid: str, **values: Any) -> Flavor:
    """Make a flavor with an id and whatever else matters."""
    options: dict[str, Any] = {"name": f"f-{flavorid}", "memory_mb": 512, "vcpus": 1, "root_gb": 1}
    return flavors.create(tx, flavorid=flavorid, **(options | values))


def ids(tx: ApiTx, **query: Any) -> list[str]:
    """List the ids that a query by an admin finds."""
    options: dict[str, Any] = {"project_id": "p", "all_projects": True, "limit": 1000, "is_public": None}
    return [flavor.flavorid for flavor in flavors.list(tx, **(options | query))]


def test_a_flavor_reads_back_as_it_was_made(tx: ApiTx) -> None:
    """What create returns is what get returns, with the transaction's time and the defaults."""
    made = make(tx, "9", name="m9", memory_mb=2048, vcpus=3, root_gb=40, ephemeral_gb=5, swap=64, description="big")
    assert made == flavors.get(tx, "9", project_id="p", all_projects=False)
    assert made == Flavor(
        id=made.id,
        flavorid="9",
        name="m9",
        memory_mb=2048,
        vcpus=3,
        root_gb=40,
        ephemeral_gb=5,
        swap=64,
        rxtx_factor=1.0,
        is_public=True,
        description="big",
        created_at=NOW,
    )


@pytest.mark.parametrize(("again", "which"), [(("1", "new"), "ID 1"), (("2", "f-1"), "name f-1")])
def test_an_id_or_name_is_given_once(tx: ApiTx, again: tuple[str, str], which: str) -> None:
    """A second flavor of the same id or name is a Conflict that says which of them is taken."""
    make(tx, "1")
    with pytest.raises(Conflict, match=rf"^Flavor with {which} already exists\.$"):
        make(tx, again[0], name=again[1])
    assert ids(tx) == ["1"]


def test_a_private_flavor_is_seen_by_those_with_access_and_by_admins(tx: ApiTx) -> None:
    """Get and list show a private flavor to its projects and to whoever may see all; to others it does not exist."""
    make(tx, "open")
    make(tx, "shut", is_public=False)
    flavors.add_access(tx, "shut", "mine")
    for project, everything, sees in (("mine", False, True), ("other", False, False), ("other", True, True)):
        listed = ids(tx, project_id=project, all_projects=everything)
        assert listed == (["open", "shut"] if sees else ["open"])
        if sees:
            assert flavors.get(tx, "shut", project_id=project, all_projects=everything).name == "f-shut"
        else:
            with pytest.raises(NotFound, match=r"^Flavor shut could not be found\.$"):
                flavors.get(tx, "shut", project_id=project, all_projects=everything)


def test_is_public_filters_as_the_incumbent_does(tx: ApiTx) -> None:
    """True gives the public ones and those the project was given, false the private ones, None all."""
    make(tx, "1")
    make(tx, "2", is_public=False)
    make(tx, "3", is_public=False)
    flavors.add_access(tx, "2", "p")
    assert ids(tx, is_public=True) == ["1", "2"]
    assert ids(tx, is_public=False) == ["2", "3"]
    assert ids(tx, is_public=None) == ["1", "2", "3"]
    assert ids(tx, is_public=False, all_projects=False) == ["2"]


def test_least_sizes_filter(tx: ApiTx) -> None:
    """`min_ram` and `min_disk` leave out what is smaller and keep what is equal."""
    make(tx, "1", memory_mb=512, root_gb=1)
    make(tx, "2", memory_mb=1024, root_gb=10)
    assert ids(tx, min_ram=1024) == ["2"]
    assert ids(tx, min_disk=10) == ["2"]
    assert ids(tx, min_ram=512, min_disk=1) == ["1", "2"]
    assert ids(tx, min_ram=1025) == []


def test_a_disabled_flavor_is_listed_for_admins_alone(tx: ApiTx) -> None:
    """A flavor that an adopted database has as disabled does not stand in other users' lists."""
    make(tx, "1")
    tx.execute(sa.update(flavors_table).values(disabled=True))
    assert ids(tx) == ["1"]
    assert ids(tx, all_projects=False) == []


@pytest.mark.parametrize("direction", ["asc", "desc"])
@pytest.mark.parametrize("key", SORT_KEYS)
def test_pages_cover_every_flavor_once_in_every_order(tx: ApiTx, key: str, direction: str) -> None:
    """Following markers gives what one long list gives, for each sort key, with ties and with NULLs in the column."""
    for number in range(7):
        make(tx, f"id{number}", name=f"n{6 - number}", memory_mb=512 * (number % 3 + 1), rxtx_factor=1.1)
        if not flavors_table.c[key].nullable or number == 3:
            continue
        nothing = number % 2 == 0
        value: Any = {
            "created_at": datetime(2026, 1, number + 1),
            "updated_at": datetime(2026, 2, number + 1),
            "description": f"d{number % 3}",
            "disabled": number % 3 == 0,
            "is_public": number % 3 == 0,
            "rxtx_factor": 0.1 * number,
        }.get(key, number % 3)
        tx.execute(
            sa.update(flavors_table)
            .where(flavors_table.c.flavorid == f"id{number}")
            .values({key: None if nothing else value})
        )
    whole = ids(tx, sort_key=key, sort_dir=direction)
    assert sorted(whole) == [f"id{number}" for number in range(7)]
    paged: list[str] = []
    while page := ids(tx, sort_key=key, sort_dir=direction, limit=2, marker=paged[-1] if paged else None):
        paged += page
    assert paged == whole


def test_the_default_order_is_by_id(tx: ApiTx) -> None:
    """Without a sort key flavors come by flavorid, ascending, and descending on request."""
    for flavorid in ("b", "c", "a"):
        make(tx, flavorid)
    assert ids(tx) == ["a", "b", "c"]
    assert ids(tx, sort_dir="desc") == ["c", "b", "a"]


@pytest.mark.parametrize("query", [{"sort_key": "deleted"}, {"sort_dir": "up"}, {"marker": "nope"}])
def test_a_bad_order_or_marker_is_refused(tx: ApiTx, query: dict[str, str]) -> None:
    """An unknown sort key, direction or marker is Invalid, never an empty page."""
    make(tx, "1")
    with pytest.raises(Invalid):
        ids(tx, **query)


def test_a_marker_that_the_caller_may_not_see_is_refused(tx: ApiTx) -> None:
    """A marker does not tell whether another project's private flavor exists."""
    make(tx, "1", is_public=False)
    with pytest.raises(Invalid):
        ids(tx, marker="1", all_projects=False)


def test_a_list_costs_two_statements(tx: ApiTx) -> None:
    """A page of flavors is read with one statement and all their extra specs with another."""
    for number in range(5):
        make(tx, str(number))
        flavors.set_extra_specs(tx, str(number), {"hw:a": str(number), "b": "x"})
    seen: list[str] = []

    @sa.event.listens_for(tx.connection, "before_cursor_execute")
    def count(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        seen.append(statement)

    found = flavors.list(tx, project_id="p", all_projects=False, limit=10)
    assert [flavor.extra_specs for flavor in found] == [{"b": "x", "hw:a": str(number)} for number in range(5)]
    assert len(seen) == 2


def test_extra_specs_merge_change_and_go(tx: ApiTx) -> None:
    """New keys are added, present ones changed, others left; a deleted key is gone, and cannot go twice."""
    make(tx, "1")
    make(tx, "2")
    flavors.set_extra_specs(tx, "2", {"a": "other"})
    flavors.set_extra_specs(tx, "1", {"a": "1", "b": "2"})
    flavors.set_extra_specs(tx, "1", {"b": "3", "c": "4"})
    flavors.set_extra_specs(tx, "1", {})

    def specs(flavorid: str) -> dict[str, str]:
        return flavors.get(tx, flavorid, project_id="p", all_projects=False).extra_specs

    assert specs("1") == {"a": "1", "b": "3", "c": "4"}
    assert flavors.get_extra_spec(tx, "1", "b", project_id="p", all_projects=False) == "3"
    flavors.delete_extra_spec(tx, "1", "a")
    assert specs("1") == {"b": "3", "c": "4"}
    assert specs("2") == {"a": "other"}
    for missing in (flavors.delete_extra_spec, _show_spec):
        with pytest.raises(NotFound, match=r"^Flavor 1 has no extra specs with key a\.$"):
            missing(tx, "1", "a")


def _show_spec(tx: ApiTx, flavorid: str, key: str) -> None:
    flavors.get_extra_spec(tx, flavorid, key, project_id="p", all_projects=False)


def test_access_is_given_once_and_taken_back_once(tx: ApiTx) -> None:
    """A second grant is a Conflict, a second removal NotFound; each change returns who has access."""
    make(tx, "1", is_public=False)
    assert flavors.list_access(tx, "1") == []
    assert flavors.add_access(tx, "1", "b") == ["b"]
    assert flavors.add_access(tx, "1", "a") == ["a", "b"]
    with pytest.raises(Conflict, match="already exists for flavor 1 and project a combination"):
        flavors.add_access(tx, "1", "a")
    assert flavors.list_access(tx, "1") == ["a", "b"]
    assert flavors.remove_access(tx, "1", "a") == ["b"]
    with pytest.raises(NotFound, match=r"^Flavor access not found for 1 / a combination\.$"):
        flavors.remove_access(tx, "1", "a")


def test_a_public_flavor_has_no_access_list(tx: ApiTx) -> None:
    """Listing a public flavor's projects is NotFound, adding one a Conflict unless the caller asks for the old way."""
    make(tx, "1")
    with pytest.raises(NotFound, match="not available for public flavors"):
        flavors.list_access(tx, "1")
    with pytest.raises(Conflict, match="public flavor"):
        flavors.add_access(tx, "1", "a")
    assert flavors.add_access(tx, "1", "a", public_too=True) == ["a"]


def test_a_description_changes_alone(tx: ApiTx) -> None:
    """Updating the description changes it and the time of the change, nothing else; None removes it."""
    made = make(tx, "1", description="old")
    changed = flavors.update_description(tx, "1", "new")
    assert changed == msgspec.structs.replace(made, description="new", updated_at=NOW)
    assert flavors.update_description(tx, "1", None).description is None


def test_a_deleted_flavor_leaves_nothing(tx: ApiTx) -> None:
    """Deleting a flavor removes its extra specs and access list, leaves the others', and frees its id and name."""
    for flavorid in ("1", "2"):
        make(tx, flavorid, is_public=False)
        flavors.set_extra_specs(tx, flavorid, {"a": "1"})
        flavors.add_access(tx, flavorid, "p")
    flavors.delete(tx, "1")
    for table in (flavors_table, flavor_extra_specs, flavor_projects):
        assert tx.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() == 1
    assert make(tx, "1").extra_specs == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda tx: flavors.delete(tx, "nope"),
        lambda tx: flavors.update_description(tx, "nope", "x"),
        lambda tx: flavors.set_extra_specs(tx, "nope", {"a": "1"}),
        lambda tx: flavors.delete_extra_spec(tx, "nope", "a"),
        lambda tx: flavors.list_access(tx, "nope"),
        lambda tx: flavors.add_access(tx, "nope", "p"),
        lambda tx: flavors.remove_access(tx, "nope", "p"),
        lambda tx: flavors.get(tx, "nope", project_id="p", all_projects=True),
    ],
)
def test_a_flavor_that_is_not_there_is_not_found(tx: ApiTx, change: Callable[[ApiTx], object]) -> None:
    """Every function that names a flavor says that there is none."""
    with pytest.raises(NotFound, match=r"^Flavor nope could not be found\.$"):
        change(tx)


def test_missing_values_of_an_adopted_row_read_as_the_incumbent_reads_them(tx: ApiTx) -> None:
    """NULLs that the incumbent's columns allow become 0, false or an empty text."""
    made = make(tx, "1")
    empty: dict[str, None] = dict.fromkeys(("root_gb", "ephemeral_gb", "disabled", "is_public", "rxtx_factor"))
    tx.execute(sa.update(flavors_table).values(empty))
    tx.execute(sa.insert(flavor_extra_specs), {"flavor_id": made.id, "key": "a", "value": None})
    read = flavors.get(tx, "1", project_id="p", all_projects=True)
    assert (read.root_gb, read.ephemeral_gb, read.disabled, read.is_public) == (0, 0, False, False)
    assert read.rxtx_factor is None
    assert read.extra_specs == {"a": ""}


# ---- a server's copy -------------------------------------------------------------------------------------------

INCUMBENT = """
{"new": null, "old": null, "cur": {"nova_object.name": "Flavor", "nova_object.namespace": "nova",
 "nova_object.version": "1.2", "nova_object.changes": ["extra_specs"], "nova_object.data": {"id": 7,
 "name": "m1.small", "memory_mb": 2048, "vcpus": 1, "root_gb": 20, "ephemeral_gb": 0, "flavorid": "2", "swap": 0,
 "rxtx_factor": 1.0, "vcpu_weight": 0, "disabled": false, "is_public": true, "extra_specs": {"hw:mem_page_size":
 "large"}, "description": null, "created_at": "2024-05-06T07:08:09Z", "updated_at": null, "deleted_at": null,
 "deleted": false}}}
"""


def test_a_stored_flavor_has_the_incumbents_shape() -> None:
    """Written by us and written by the incumbent, the same flavor is the same JSON, but for its list of changes."""
    theirs = json.loads(INCUMBENT)
    del theirs["cur"]["nova_object.changes"]
    assert json.loads(flavors.to_stored(flavors.from_stored(INCUMBENT))) == theirs


def test_a_stored_flavor_reads_back(tx: ApiTx) -> None:
    """A server's copy has all of the flavor but its description, which the incumbent does not store either."""
    make(tx, "1", description="not stored", rxtx_factor=1.5)
    flavors.set_extra_specs(tx, "1", {"hw:cpu_policy": "dedicated"})
    flavor = flavors.update_description(tx, "1", "still not stored")
    expected = msgspec.structs.replace(flavor, description=None)
    assert flavors.from_stored(flavors.to_stored(flavor)) == expected


def test_an_old_copy_with_keys_missing_reads() -> None:
    """Copies of older releases lack keys; they read with the incumbent's defaults, and times without a zone are UTC."""
    old = {
        "id": 1,
        "flavorid": "1",
        "name": "a",
        "memory_mb": 1,
        "vcpus": 1,
        "root_gb": 0,
        "created_at": "2015-01-02T03:04:05",
    }
    read = flavors.from_stored(json.dumps({"cur": {"nova_object.data": old}}))
    assert (read.disabled, read.is_public, read.extra_specs, read.swap) == (False, True, {}, 0)
    assert read.created_at == datetime(2015, 1, 2, 3, 4, 5)


def test_a_damaged_copy_is_an_error() -> None:
    """What is not a stored flavor raises instead of reading as some other size."""
    with pytest.raises(msgspec.DecodeError):
        flavors.from_stored('{"cur": {"nova_object.data": {"id": 1}}}')
