"""The simulated hypervisor: its operations, its limits, and the journal that outlives its process."""

import asyncio
import random
import resource
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path

import pytest

from cellway.agent.drivers import JOURNAL_LINES, Driver, DriverError, FakeDriver, Guest, PowerState
from cellway.config import AgentSection
from cellway.errors import Invalid

pytestmark = pytest.mark.anyio

UUID = "7a1f2b5e-0000-4000-8000-000000000001"
OTHER = "7a1f2b5e-0000-4000-8000-000000000002"

Act = Callable[[Driver], Awaitable[None]]

OPERATIONS: dict[str, Act] = {
    "start": lambda driver: driver.start(UUID),
    "stop": lambda driver: driver.stop(UUID),
    "reboot": lambda driver: driver.reboot(UUID, hard=False),
    "hard_reboot": lambda driver: driver.reboot(UUID, hard=True),
    "pause": lambda driver: driver.pause(UUID),
    "unpause": lambda driver: driver.unpause(UUID),
    "suspend": lambda driver: driver.suspend(UUID),
    "resume": lambda driver: driver.resume(UUID),
}
RUNNING, PAUSED, SHUTDOWN, SUSPENDED = (
    PowerState.RUNNING,
    PowerState.PAUSED,
    PowerState.SHUTDOWN,
    PowerState.SUSPENDED,
)
WAY_TO = {RUNNING: (), PAUSED: ("pause",), SHUTDOWN: ("stop",), SUSPENDED: ("suspend",)}
# From each power state: what each operation leads to; the same state is "nothing to do", a missing one is refused.
LEADS_TO = {
    RUNNING: {
        "start": RUNNING,
        "stop": SHUTDOWN,
        "pause": PAUSED,
        "unpause": RUNNING,
        "suspend": SUSPENDED,
        "resume": RUNNING,
    },
    PAUSED: {"stop": SHUTDOWN, "pause": PAUSED, "unpause": RUNNING},
    SHUTDOWN: {"start": RUNNING, "stop": SHUTDOWN},
    SUSPENDED: {"stop": SHUTDOWN, "suspend": SUSPENDED, "resume": RUNNING},
}
PLAIN = sorted(set(OPERATIONS) - {"reboot", "hard_reboot"})


class InstantClock:
    """A clock that is at once where a sleeper wants it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> datetime:
        return datetime(2024, 1, 1)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        await asyncio.sleep(0)


def make(
    settings: AgentSection | None = None,
    *,
    clock: InstantClock | None = None,
    seed: int = 1,
    journal: Path | None = None,
) -> FakeDriver:
    """Return a driver of one host."""
    return FakeDriver(
        "host1",
        settings or AgentSection(),
        clock=clock or InstantClock(),
        randomness=random.Random(seed),
        journal=journal,
    )


async def spawn(
    driver: Driver, uuid: str = UUID, *, vcpus: int = 1, memory_mb: int = 64, disk_gb: int = 1, attempt: int = 1
) -> None:
    """Spawn a small guest."""
    await driver.spawn(uuid, name="web", vcpus=vcpus, memory_mb=memory_mb, disk_gb=disk_gb, attempt=attempt)


def effects(driver: FakeDriver) -> list[str]:
    """Name the effects that the driver had."""
    return [done.operation for done in driver.operations]


async def power_state(driver: Driver) -> PowerState:
    """Return what the guest does."""
    guest = await driver.find(UUID)
    assert guest is not None
    return guest.power_state


async def test_a_spawned_guest_runs_and_is_in_the_inventory() -> None:
    """A spawned guest is running and remembers what it was made of."""
    driver = make()
    await spawn(driver, vcpus=2, memory_mb=512, disk_gb=10, attempt=3)
    guest = Guest(name="web", power_state=RUNNING, vcpus=2, memory_mb=512, disk_gb=10, attempt=3)
    assert await driver.inventory() == {UUID: guest}
    assert await driver.find(UUID) == guest
    assert await driver.find(OTHER) is None


@pytest.mark.parametrize("state", LEADS_TO)
@pytest.mark.parametrize("operation", PLAIN)
async def test_an_operation_leads_to_its_power_state_once_or_is_refused(state: PowerState, operation: str) -> None:
    """Each operation has one effect, none when its end is reached, and is refused where it makes no sense."""
    driver = make()
    await spawn(driver)
    for step in WAY_TO[state]:
        await OPERATIONS[step](driver)
    before = effects(driver)
    end = LEADS_TO[state].get(operation)
    if end is None:
        with pytest.raises(DriverError, match=state.name.lower()):
            await OPERATIONS[operation](driver)
        assert await power_state(driver) == state
        assert effects(driver) == before
        return
    await OPERATIONS[operation](driver)
    await OPERATIONS[operation](driver)
    assert await power_state(driver) == end
    assert effects(driver) == before + ([] if end == state else [operation])


@pytest.mark.parametrize("state", LEADS_TO)
async def test_a_hard_reboot_takes_any_state_and_a_soft_one_a_running_guest(state: PowerState) -> None:
    """A hard reboot runs a guest from any power state; a soft one needs it running; each counts every time."""
    driver = make()
    await spawn(driver)
    for step in WAY_TO[state]:
        await OPERATIONS[step](driver)
    before = effects(driver)
    if state == RUNNING:
        await driver.reboot(UUID, hard=False)
        assert effects(driver) == [*before, "reboot"]
    else:
        with pytest.raises(DriverError):
            await driver.reboot(UUID, hard=False)
        assert effects(driver) == before
    await driver.reboot(UUID, hard=True)
    assert await power_state(driver) == RUNNING
    assert effects(driver)[-1] == "hard_reboot"


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_no_operation_works_on_a_missing_guest(operation: str) -> None:
    """Acting on a guest that is not there is refused; destroying it is not."""
    driver = make()
    with pytest.raises(DriverError, match="not there"):
        await OPERATIONS[operation](driver)
    await driver.destroy(UUID)
    assert effects(driver) == []


async def test_spawn_and_destroy_may_be_repeated() -> None:
    """The same attempt spawns once, another attempt is refused while the guest stands, and destroy works once."""
    driver = make()
    await spawn(driver, attempt=1)
    await spawn(driver, attempt=1)
    with pytest.raises(DriverError, match="another build attempt"):
        await spawn(driver, attempt=2)
    await driver.destroy(UUID)
    await driver.destroy(UUID)
    await spawn(driver, attempt=2)
    assert effects(driver) == ["spawn", "destroy", "spawn"]


@pytest.mark.parametrize(
    ("resource_name", "fits", "too_much"),
    [
        ("vCPUs", {"vcpus": 8}, {"vcpus": 1}),
        ("memory", {"memory_mb": 1024}, {"memory_mb": 1}),
        ("disk", {"disk_gb": 40}, {"disk_gb": 1}),
    ],
)
async def test_capacity_is_the_total_times_its_ratio(
    resource_name: str, fits: dict[str, int], too_much: dict[str, int]
) -> None:
    """A host takes guests up to capacity times ratio of each resource, and takes again what a destroyed one had."""
    settings = AgentSection(vcpus=2, cpu_allocation_ratio=4.0, memory_mb=1024, disk_gb=20, disk_allocation_ratio=2.0)
    driver = make(settings)

    async def take(uuid: str, wanted: dict[str, int]) -> None:
        await driver.spawn(uuid, name="web", attempt=1, **({"vcpus": 0, "memory_mb": 0, "disk_gb": 0} | wanted))

    await take(UUID, fits)
    with pytest.raises(DriverError, match=f"not enough {resource_name}"):
        await take(OTHER, too_much)
    await driver.destroy(UUID)
    await take(OTHER, too_much)
    assert list(await driver.inventory()) == [OTHER]


async def test_failures_follow_the_rate_and_the_seed() -> None:
    """The share of builds that fail is the configured one, and the same seed fails the same builds."""

    async def failed(rate: float, seed: int) -> list[int]:
        driver = make(AgentSection(failure_rate=rate), seed=seed)
        numbers = []
        for number in range(200):
            try:
                await spawn(driver, f"{number}", vcpus=0, memory_mb=0, disk_gb=0)
            except DriverError:
                numbers.append(number)
        assert len(await driver.inventory()) == 200 - len(numbers)
        return numbers

    assert await failed(0.0, 1) == []
    assert len(await failed(1.0, 1)) == 200
    assert 30 < len(await failed(0.25, 1)) < 70
    assert await failed(0.25, 1) == await failed(0.25, 1) != await failed(0.25, 2)


async def test_an_operation_takes_the_configured_time_and_is_whole_or_not_at_all() -> None:
    """Each operation takes the latency; one that is cancelled meanwhile has had no effect."""
    clock = InstantClock()
    driver = make(AgentSection(latency_seconds=2.5), clock=clock)
    await spawn(driver)
    await driver.stop(UUID)
    assert clock.seconds == 5.0
    task = asyncio.ensure_future(driver.destroy(UUID))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert await power_state(driver) == SHUTDOWN


async def test_resources_are_the_configured_ones() -> None:
    """What the host says it has is what its configuration says."""
    resources = await make(AgentSection(vcpus=3, memory_mb=99, disk_gb=7, cpu_allocation_ratio=1.5)).resources()
    assert (resources.vcpus, resources.memory_mb, resources.disk_gb, resources.cpu_allocation_ratio) == (3, 99, 7, 1.5)
    assert resources.hypervisor_hostname == "host1"


async def test_without_a_journal_nothing_outlives_the_driver() -> None:
    """A driver without a journal starts empty."""
    await spawn(make())
    assert await make().inventory() == {}


async def test_guests_come_back_from_the_journal(tmp_path: Path) -> None:
    """A driver on the same journal has the guests as the last effects left them; the file is its owner's alone."""
    journal = tmp_path / "host1.journal"
    first = make(journal=journal)
    await spawn(first, UUID, attempt=4)
    await first.pause(UUID)
    await spawn(first, OTHER)
    await first.destroy(OTHER)
    assert journal.stat().st_mode & 0o777 == 0o600
    second = make(journal=journal)
    assert await second.inventory() == await first.inventory()
    assert await power_state(second) == PAUSED
    assert effects(second) == []


@pytest.mark.parametrize("cut", [1, 2, 40])
async def test_a_torn_last_line_never_happened(tmp_path: Path, cut: int) -> None:
    """A last line without its end is dropped, and what is written after it is whole."""
    journal = tmp_path / "journal"
    first = make(journal=journal)
    await spawn(first, UUID)
    await spawn(first, OTHER)
    journal.write_bytes(journal.read_bytes()[:-cut])
    second = make(journal=journal)
    assert list(await second.inventory()) == [UUID]
    await second.stop(UUID)
    third = make(journal=journal)
    assert await power_state(third) == SHUTDOWN


async def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    """A journal damaged in the middle is not guessed at: the error names the line, and the file stays as it is."""
    journal = tmp_path / "journal"
    driver = make(journal=journal)
    await spawn(driver, UUID)
    await spawn(driver, OTHER)
    damaged = journal.read_bytes().replace(b"spawn", b"\xff\x00awn", 1)
    journal.write_bytes(damaged)
    with pytest.raises(Invalid, match="line 1 "):
        make(journal=journal)
    assert journal.read_bytes() == damaged


async def test_a_journal_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """A journal in a folder that does not exist, or that is a folder, is refused when the driver is made."""
    with pytest.raises(Invalid):
        make(journal=tmp_path / "missing" / "journal")
    with pytest.raises(Invalid):
        make(journal=tmp_path)


async def test_the_journal_stays_bounded(tmp_path: Path) -> None:
    """The journal is rewritten at each start, and while running once it has grown for long; nothing is lost."""
    journal = tmp_path / "journal"
    driver = make(journal=journal)
    await spawn(driver, UUID)
    await spawn(driver, OTHER)
    for _ in range(JOURNAL_LINES // 2 + 10):
        await driver.pause(UUID)
        await driver.unpause(UUID)
    assert journal.read_bytes().count(b"\n") < 100
    again = make(journal=journal)
    assert journal.read_bytes().count(b"\n") == 2
    assert await again.inventory() == await driver.inventory()


async def test_a_full_disk_fails_the_operation_and_tears_nothing(tmp_path: Path) -> None:
    """An effect whose line does not fit on the disk did not happen, and the journal can be read and go on."""
    journal = tmp_path / "journal"
    driver = make(journal=journal)
    await spawn(driver, UUID)
    size = journal.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(DriverError, match="disk"):
            await driver.stop(UUID)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert journal.stat().st_size == size
    assert await power_state(driver) == RUNNING
    await driver.stop(UUID)
    assert await power_state(make(journal=journal)) == SHUTDOWN


SPAWN_FOR_EVER = """
import asyncio, itertools, random, sys
from pathlib import Path
from cellway.agent.drivers import FakeDriver
from cellway.config import AgentSection
from cellway.context import SystemClock

async def main():
    settings, randomness, journal = AgentSection(latency_seconds=0), random.Random(1), Path(sys.argv[1])
    driver = FakeDriver("h", settings, clock=SystemClock(), randomness=randomness, journal=journal)
    for number in itertools.count():
        await driver.spawn(str(number), name="n", vcpus=0, memory_mb=0, disk_gb=0, attempt=1)
        print(number, flush=True)

asyncio.run(main())
"""


async def test_guests_survive_a_killed_process(tmp_path: Path) -> None:
    """Every guest that a driver said it had spawned is there after a `kill -9`, and at most one more."""
    journal = tmp_path / "journal"
    with subprocess.Popen(  # noqa: ASYNC220  (nothing else runs on this loop)
        [sys.executable, "-c", SPAWN_FOR_EVER, str(journal)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 50:
                break
        process.kill()
        said = [51 + number for number, _ in enumerate(process.stdout)]
    guests = await make(journal=journal).inventory()
    last = said[-1] if said else 50
    assert list(guests) in ([str(n) for n in range(last + 1)], [str(n) for n in range(last + 2)])
