"""The real `openstack` command works unchanged, with the clouds.yaml that Cellway wrote."""

from pathlib import Path

from tests.acceptance.control_plane import ADMIN, MEMBER, Plane


def status_after(plane: Plane, server: str, old: str) -> str:
    """Ask until a server's status is no longer `old`, ten times at most, and return it."""
    for _ in range(10):
        status = str(plane.client(MEMBER, "server", "show", server)["status"])
        if status != old:
            return status
    return old


def quotas_of(plane: Plane, *options: str) -> dict[str, int]:
    """Return the limits that the member is shown, by the client's names."""
    shown = plane.client(MEMBER, "quota", "show", "--compute", *options)
    return {row["Resource"]: row["Limit"] for row in shown}


class RealClient:
    """What users and admins do with the client. A subclass says over which `databases` the control plane runs."""

    def test_flavors_are_listed_and_shown(self, plane: Plane, flavor: str) -> None:
        """`flavor list` and `flavor show` by name give what was created."""
        assert flavor in [row["Name"] for row in plane.client(MEMBER, "flavor", "list")]
        assert plane.client(MEMBER, "flavor", "show", flavor)["vcpus"] == 1

    def test_keypairs_come_and_go(self, plane: Plane, tmp_path: Path) -> None:
        """`keypair create` (with a key made by the client), `list` and `delete` work."""
        private = tmp_path / "key"
        plane.client(MEMBER, "keypair", "create", "--private-key", str(private), "laptop")
        assert private.read_text().startswith("-----BEGIN OPENSSH PRIVATE KEY-----")
        assert [row["Name"] for row in plane.client(MEMBER, "keypair", "list")] == ["laptop"]
        plane.client(MEMBER, "keypair", "delete", "laptop", form="")
        assert plane.client(MEMBER, "keypair", "list") == []

    def test_servers_are_listed_for_their_project_and_for_all(self, plane: Plane, server: str) -> None:
        """`server list` shows the member its server, and an admin every project's with its host."""
        own = plane.client(MEMBER, "server", "list")
        assert [(row["ID"], row["Name"], row["Status"], row["Image"], row["Flavor"]) for row in own] == [
            (server, "web-1", "ACTIVE", "tiny", "m1.tiny")
        ]
        everything = plane.client(ADMIN, "server", "list", "--all-projects", "--long")
        assert [row["Host"].startswith("cell") for row in everything if row["ID"] == server] == [True]
        assert plane.client(ADMIN, "server", "list") == []

    def test_a_server_is_shown_by_name_and_by_id(self, plane: Plane, server: str) -> None:
        """`server show` finds it either way."""
        assert plane.client(MEMBER, "server", "show", "web-1")["id"] == server
        assert plane.client(MEMBER, "server", "show", server)["name"] == "web-1"

    def test_a_server_is_renamed_and_given_properties(self, plane: Plane, server: str) -> None:
        """`server set --name` and `--property` change what `show` says."""
        plane.client(MEMBER, "server", "set", "--property", "tier=gold", server, form="")
        plane.client(MEMBER, "server", "set", "--name", "web-one", server, form="")
        shown = plane.client(MEMBER, "server", "show", server)
        assert (shown["name"], shown["properties"]) == ("web-one", {"tier": "gold"})
        plane.client(MEMBER, "server", "set", "--name", "web-1", server, form="")

    def test_a_server_is_stopped_started_and_rebooted(self, plane: Plane, server: str) -> None:
        """`stop`, `start` and `reboot --wait` do what they say, and the history keeps them."""
        plane.client(MEMBER, "server", "stop", server, form="")
        assert status_after(plane, server, "ACTIVE") == "SHUTOFF"
        plane.client(MEMBER, "server", "start", server, form="")
        assert status_after(plane, server, "SHUTOFF") == "ACTIVE"
        plane.client(MEMBER, "server", "reboot", "--wait", server, form="")
        events = [row["Action"] for row in plane.client(MEMBER, "server", "event", "list", server)]
        assert events == ["reboot", "start", "stop", "create"]

    def test_a_server_is_deleted(self, plane: Plane, flavor: str) -> None:
        """`server delete --wait` returns when the server is gone."""
        plane.client(MEMBER, "server", "create", "--flavor", flavor, "--image", "tiny", "--wait", "brief")
        plane.client(MEMBER, "server", "delete", "--wait", "brief", form="")
        assert "brief" not in [row["Name"] for row in plane.client(MEMBER, "server", "list")]

    def test_quotas_are_shown_set_listed_and_deleted(self, plane: Plane) -> None:
        """`quota set` of a project and of a class shows in `show`, `--default`, `--usage`, `list` and `limits show`."""
        before = quotas_of(plane)
        plane.client(ADMIN, "quota", "set", "--class", "--injected-files", "6", "default", form="")
        plane.client(ADMIN, "quota", "set", "--cores", "77", "--properties", "99", "demo", form="")
        expected = before | {"cores": 77, "properties": 99, "injected-files": 6}
        assert quotas_of(plane) == expected
        assert quotas_of(plane, "--default") == before | {"injected-files": 6}
        usage = {row["Resource"]: row for row in plane.client(MEMBER, "quota", "show", "--usage", "--compute")}
        assert {name: row["Limit"] for name, row in usage.items() if expected.get(name)} == {
            name: limit for name, limit in expected.items() if limit
        }
        absolute = {row["Name"]: row["Value"] for row in plane.client(MEMBER, "limits", "show", "--absolute")}
        assert (absolute["max_total_cores"], absolute["max_server_meta"]) == (77, 99)
        assert usage["cores"]["In Use"] + usage["cores"]["Reserved"] == absolute["total_cores_used"]
        assert [row["Cores"] for row in plane.client(ADMIN, "quota", "list", "--compute")] == [77]
        plane.client(ADMIN, "quota", "delete", "--compute", "demo", form="")
        assert plane.client(ADMIN, "quota", "list", "--compute") == []
        assert quotas_of(plane) == before | {"injected-files": 6}
        plane.client(ADMIN, "quota", "set", "--class", "--injected-files", "5", "default", form="")

    def test_a_server_over_quota_is_refused(self, plane: Plane, server: str, flavor: str) -> None:
        """`server create` ends with 1 and the numbers; a limit below what is used is refused without `--force`."""
        absolute = {row["Name"]: row["Value"] for row in plane.client(MEMBER, "limits", "show", "--absolute")}
        used = absolute["total_instances_used"]
        assert used >= 1
        plane.client(ADMIN, "quota", "set", "--instances", str(used), "demo", form="")
        one = ("server", "create", "--flavor", flavor, "--image", "tiny", "--wait", "too-many")
        refused = plane.run_client(MEMBER, *one)
        assert refused.returncode == 1
        assert refused.stderr.rstrip().endswith(
            f"Quota exceeded for instances: Requested 1, but already used {used} of {used} instances"
        )
        assert "too-many" not in [row["Name"] for row in plane.client(MEMBER, "server", "list")]
        below = plane.run_client(ADMIN, "quota", "set", "--instances", "0", "demo")
        assert below.returncode == 1
        assert f"must be greater than or equal to already used and reserved {used}." in below.stderr
        plane.client(ADMIN, "quota", "set", "--force", "--instances", "0", "demo", form="")
        assert quotas_of(plane)["instances"] == 0
        plane.client(ADMIN, "quota", "delete", "--compute", "demo", form="")
        assert plane.client(MEMBER, "server", "show", server)["status"] == "ACTIVE"

    def test_hypervisors_are_listed_and_shown(self, plane: Plane) -> None:
        """`hypervisor list` has every host of every cell, and `show` finds one by name."""
        names = [row["Hypervisor Hostname"] for row in plane.client(ADMIN, "hypervisor", "list")]
        assert names == plane.hosts
        assert plane.client(ADMIN, "hypervisor", "show", "cell2-h1")["state"] == "up"

    def test_services_are_listed_and_disabled(self, plane: Plane) -> None:
        """`compute service set --disable` shows in the list with its reason, and `--enable` takes it back."""
        plane.client(
            ADMIN,
            "compute",
            "service",
            "set",
            "--disable",
            "--disable-reason",
            "disk",
            "cell2-h2",
            "nova-compute",
            form="",
        )
        listed = {row["Host"]: row for row in plane.client(ADMIN, "compute", "service", "list", "--long")}
        assert (listed["cell2-h2"]["Status"], listed["cell2-h2"]["Disabled Reason"]) == ("disabled", "disk")
        assert listed["cell1-h1"]["State"] == "up"
        plane.client(ADMIN, "compute", "service", "set", "--enable", "cell2-h2", "nova-compute", form="")

    def test_servers_of_a_group_run_apart(self, plane: Plane, flavor: str) -> None:
        """`server group create`, `list`, `show` and `delete`, and `server create --hint group=…`, do what they say."""
        made = plane.client(MEMBER, "server", "group", "create", "--policy", "anti-affinity", "apart")
        assert plane.client(MEMBER, "server", "group", "list")[0]["Name"] == "apart"
        for name in ("apart-1", "apart-2"):
            hint = ("--hint", f"group={made['id']}", "--wait", name)
            plane.client(MEMBER, "server", "create", "--flavor", flavor, "--image", "tiny", *hint)
        servers = plane.client(ADMIN, "server", "list", "--all-projects", "--long", "--name", "apart-")
        assert len({row["Host"] for row in servers}) == 2
        shown = plane.client(MEMBER, "server", "group", "show", "apart")
        assert sorted(shown["members"]) == sorted(row["ID"] for row in servers)
        plane.client(MEMBER, "server", "delete", "--wait", "apart-1", "apart-2", form="")
        assert plane.client(MEMBER, "server", "group", "show", made["id"])["members"] == []
        plane.client(MEMBER, "server", "group", "delete", "apart", form="")
        assert plane.client(MEMBER, "server", "group", "list") == []

    def test_an_aggregate_over_two_cells_is_a_zone(self, plane: Plane, flavor: str) -> None:
        """`aggregate create`, `list`, `show`, `set`, `unset`, `add host`, `remove host` and `delete` do what they say,
        and a server created with `--availability-zone` is in that zone.
        """
        busy = {row["Host"] for row in plane.client(ADMIN, "server", "list", "--all-projects", "--long")}
        free = {host.partition("-")[0]: host for host in plane.hosts if host not in busy}
        hosts = [free["cell1"], free["cell2"]]
        made = plane.client(ADMIN, "aggregate", "create", "--zone", "east", "--property", "ssd=true", "racks")
        assert (made["name"], made["availability_zone"]) == ("racks", "east")
        for host in hosts:
            plane.client(ADMIN, "aggregate", "add", "host", "racks", host)
        zones = plane.client(MEMBER, "availability", "zone", "list", "--compute")
        assert sorted(row["Zone Name"] for row in zones) == ["east", "nova"]
        located = ("--availability-zone", "east", "--wait", "located")
        plane.client(MEMBER, "server", "create", "--flavor", flavor, "--image", "tiny", *located)
        [row] = plane.client(ADMIN, "server", "list", "--all-projects", "--long", "--name", "located")
        assert (row["Host"] in hosts, row["Availability Zone"]) == (True, "east")
        refused = plane.run_client(ADMIN, "aggregate", "remove", "host", "racks", row["Host"])
        assert (refused.returncode, "409" in refused.stderr) == (1, True)
        plane.client(MEMBER, "server", "delete", "--wait", "located", form="")
        plane.client(ADMIN, "aggregate", "set", "--property", "ssd=no", "--property", "gpu=1", "racks", form="")
        plane.client(ADMIN, "aggregate", "unset", "--property", "ssd", "racks", form="")
        plane.client(ADMIN, "aggregate", "set", "--name", "shelves", "racks", form="")
        shown = plane.client(ADMIN, "aggregate", "show", "shelves")
        assert (shown["properties"], shown["hosts"]) == ({"gpu": "1"}, hosts)
        assert plane.client(ADMIN, "aggregate", "show", str(shown["id"]))["uuid"] == shown["uuid"]
        for host in hosts:
            plane.client(ADMIN, "aggregate", "remove", "host", "shelves", host)
        [listed] = plane.client(ADMIN, "aggregate", "list", "--long")
        assert (listed["Name"], listed["Availability Zone"], listed["Properties"]) == ("shelves", "east", {"gpu": "1"})
        plane.client(ADMIN, "aggregate", "delete", "shelves", form="")
        assert plane.client(ADMIN, "aggregate", "list") == []

    def test_usage_is_listed_and_shown(self, plane: Plane, server: str) -> None:
        """`usage list` has every project for an admin, and `usage show` the member's own."""
        project = plane.client(MEMBER, "token", "issue")["project_id"]
        [listed] = [row for row in plane.client(ADMIN, "usage", "list") if row["Project"] == project]
        shown = plane.client(MEMBER, "usage", "show")
        for row in (listed, shown):
            assert server in [one["instance_id"] for one in row["Servers"]]
            assert 0 < row["CPU Hours"] < row["RAM MB-Hours"]

    def test_what_else_users_ask_for(self, plane: Plane, server: str) -> None:
        """`availability zone list`, `limits show --absolute`, `image list` and `token issue` answer."""
        zones = plane.client(MEMBER, "availability", "zone", "list", "--compute")
        assert [row["Zone Name"] for row in zones] == ["nova"]
        used = {row["Name"]: row["Value"] for row in plane.client(MEMBER, "limits", "show", "--absolute")}
        assert used["total_instances_used"] >= 1
        assert "tiny" in [row["Name"] for row in plane.client(MEMBER, "image", "list")]
        assert plane.client(MEMBER, "token", "issue")["project_id"]
        assert server

    def test_nothing_unexpected_was_logged(self, plane: Plane) -> None:
        """After all of it no request has failed and no loop has died."""
        assert '"level": "error"' not in plane.log
        assert '"level": "critical"' not in plane.log


class TestEmbedded(RealClient):
    """`cellway up`, three cells with two hosts each."""

    databases = "sqlite"
