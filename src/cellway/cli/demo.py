"""`cellway demo`: an embedded deployment that boots servers through the real client and shows where they landed."""

import asyncio
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
import uvloop

from cellway import __version__
from cellway.cli.output import set_up_logs, table
from cellway.cli.up import CellsOption, HostsOption, PortOption, Running, embedded, until_stopped, wanted_layout
from cellway.context import service_context
from cellway.db.transaction import CellTx
from cellway.errors import NotFound, Unavailable
from cellway.identity.images import TINY
from cellway.ids import RequestId
from cellway.instances.reading import DEFAULT_SORT, Filter, list_page
from cellway.instances.records import Instance
from cellway.operations.embedded import DataFolder, Layout

app = typer.Typer(rich_markup_mode=None)

FLAVOR = "m1.tiny"
BOOT_SECONDS = 60


@app.command()
def demo(
    data: Annotated[Path, typer.Option(help="Folder of the demo.")] = Path(".demo"),
    cells: CellsOption = None,
    hosts_per_cell: HostsOption = None,
    servers: Annotated[int, typer.Option(min=1, max=100, help="Servers to boot.")] = 9,
    port: PortOption = None,
    oneshot: Annotated[bool, typer.Option("--oneshot", help="End after the table instead of serving on.")] = False,
) -> None:
    """Three cells, nine servers booted through the real client, and a table of who landed where."""
    set_up_logs(serving=True)
    folder = DataFolder(data.absolute())
    uvloop.run(_demo(folder, wanted_layout(folder, cells, hosts_per_cell), servers, port, oneshot))


class _Steps:
    """Prints a line per step: what, how, state, and seconds since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def done(self, what: str, how: str, state: str) -> None:
        print(f"  {what:<11} {how:<50} {state:<9} {self.seconds:4.1f} s", flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began


async def _demo(folder: DataFolder, layout: Layout, servers: int, port: int | None, oneshot: bool) -> None:
    client = _client()
    hosts = layout.cells * layout.hosts_per_cell
    print(
        f"cellway {__version__} demo: {layout.cells} cells, {hosts} simulated hosts, SQLite. "
        "Nothing leaves this machine.\n",
        flush=True,
    )
    steps = _Steps()
    async with embedded(folder, layout, config=None, listen="127.0.0.1", port=port) as running:
        names = [cell.ref.name for cell in running.application.cells.snapshot.all]
        steps.done("databases", ", ".join(["api", *names]), "opened" if running.before else "created")
        steps.done("cells", f"{', '.join(names[1:])}: {layout.hosts_per_cell} hosts each", "up")
        steps.done("api", running.application.public_endpoint, "ready")
        made = await asyncio.to_thread(_make_flavor, client, folder)
        steps.done("flavor", f"{FLAVOR}: 1 vCPU, 512 MB, 1 GB", "made" if made else "there")
        booted = await asyncio.to_thread(_boot, client, folder, [f"web-{number + 1}" for number in range(servers)])
        steps.done("servers", f"{booted} of {servers} {'#' * 40}", "ACTIVE")
        print("\nWhere they landed (read from each cell's own database):\n")
        for line in table(["CELL", "SERVERS", "HOSTS", "NAMES"], await _where(running)):
            print(f"  {line}")
        print(f"\nThe API shows one cloud with {booted} servers and no cells.", flush=True)
        if oneshot:
            print(f"\nDone in {steps.seconds:.1f} s.")
            return
        _suggest(folder)
        await until_stopped(running)
    print(f"Stopped. The servers are kept in {folder.path}.")


def _client() -> ModuleType:
    """Return the real client's library, which only the demo needs. Raises: NotFound when it is not installed."""
    try:
        return importlib.import_module("openstack")
    except ImportError as error:
        raise NotFound("demo.no_client", "openstacksdk is not installed, and the demo boots through it") from error


def _connect(client: ModuleType, folder: DataFolder, cloud: str) -> Any:
    configuration = client.config.OpenStackConfig(config_files=[str(folder.clouds)], load_envvars=False)
    return client.connection.Connection(config=configuration.get_one(cloud=cloud))


def _make_flavor(client: ModuleType, folder: DataFolder) -> bool:
    with _connect(client, folder, "cellway-admin") as cloud:
        if cloud.compute.find_flavor(FLAVOR) is not None:
            return False
        cloud.compute.create_flavor(name=FLAVOR, vcpus=1, ram=512, disk=1)
        return True


def _boot(client: ModuleType, folder: DataFolder, names: Sequence[str]) -> int:
    """Boot the servers that are not there yet, all at once, and wait for each. Raises: Unavailable."""
    with _connect(client, folder, "cellway") as cloud:
        flavor, image = cloud.compute.find_flavor(FLAVOR), cloud.image.find_image(TINY.name)
        present = {server.name: server for server in cloud.compute.servers()}
        wanted = [
            present.get(name)
            or cloud.compute.create_server(name=name, flavor_id=flavor.id, image_id=image.id, networks="auto")
            for name in names
        ]
        try:
            for server in wanted:
                cloud.compute.wait_for_server(server, interval=0.1, wait=BOOT_SECONDS)
        except client.exceptions.SDKException as error:
            raise Unavailable("demo.boot_failed", f"a server did not become ACTIVE: {error}") from error
        return len(wanted)


async def _where(running: Running) -> list[list[str]]:
    """Return a row per cell that has hosts, each read from that cell's own database."""
    application = running.application
    context = service_context(RequestId("cellway-demo"))
    rows = []
    for cell in application.cells.snapshot.with_hosts:
        with application.cells.target_cell(context, cell) as cctx:
            found = await application.databases.on(cctx).read(_servers)
        found.sort(key=lambda server: (len(server.display_name), server.display_name))
        hosts = sorted({server.host for server in found if server.host})
        names = [server.display_name for server in found]
        rows.append([cell.ref.name, str(len(found)), " ".join(hosts), " ".join(names)])
    return rows


def _servers(tx: CellTx) -> list[Instance]:
    return list_page(tx, Filter(), DEFAULT_SORT, 1000, details=False)


def _suggest(folder: DataFolder) -> None:
    print(
        "\nTry in another terminal:\n"
        "\n"
        f"  export OS_CLIENT_CONFIG_FILE={folder.clouds} OS_CLOUD=cellway\n"
        "  export PATH=$PWD/.venv/bin:$PATH\n"
        "  openstack server list\n"
        f"  openstack server create --flavor {FLAVOR} --image {TINY.name} --wait mine\n"
        "  openstack --os-cloud cellway-admin hypervisor list\n"
        f"  cellway cell list --data {folder.path}\n"
        f"  cellway host list --data {folder.path}\n"
        "\n"
        f"Data is in {folder.path} and comes back next time. Ctrl-C stops. `make demo-clean` removes it.",
        flush=True,
    )
