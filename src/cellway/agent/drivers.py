"""What an agent needs of a hypervisor, and a simulated one.

The agent calls these and nothing else does. A driver knows one host: no queue, no database, no conductor.
`FakeDriver` has settable latency, capacity and failure rate, and a journal file from which its guests come back
after a `kill -9`.
"""

import os
import random
from collections import deque
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Final, Protocol

import msgspec

from cellway.config import AgentSection
from cellway.context import Clock
from cellway.errors import Invalid
from cellway.rpc.calls import HostResources

OPERATIONS_REMEMBERED: Final = 10_000
"""Operations that a `FakeDriver` keeps in memory, the newest: more than any test counts, about 5 MB."""

JOURNAL_LINES: Final = 10_000
"""Lines appended to a journal before it is rewritten with one per guest: about 3 MB, read in a tenth of a second."""


class PowerState(IntEnum):
    """What a guest does, in the incumbent's numbers."""

    NOSTATE = 0
    RUNNING = 1
    PAUSED = 3
    SHUTDOWN = 4
    SUSPENDED = 7


class Guest(msgspec.Struct, frozen=True, kw_only=True):
    """One server as the hypervisor has it. `attempt` is the build attempt that made it."""

    name: str
    power_state: PowerState
    vcpus: int
    memory_mb: int
    disk_gb: int
    attempt: int


class DriverError(Exception):
    """The hypervisor refused or failed; the text is a sentence that is shown to the server's owner."""


class Driver(Protocol):
    """A hypervisor.

    Every operation may be repeated: one whose end is reached already does nothing (a reboot has no such end). One
    that is cancelled leaves the guest as it was or as it was to be, and `inventory` says which. All raise DriverError.
    """

    async def resources(self) -> HostResources:
        """Return what the host has."""
        ...

    async def inventory(self) -> Mapping[str, Guest]:
        """Return every guest of the host, by instance uuid."""
        ...

    async def find(self, instance_uuid: str) -> Guest | None:
        """Return one guest, or None."""
        ...

    async def spawn(
        self, instance_uuid: str, *, name: str, vcpus: int, memory_mb: int, disk_gb: int, attempt: int
    ) -> None:
        """Make a guest and run it; nothing to do when the host has it from the same attempt."""
        ...

    async def destroy(self, instance_uuid: str) -> None:
        """Remove a guest, whatever it does; nothing to do when there is none."""
        ...

    async def start(self, instance_uuid: str) -> None:
        """Run a guest that is shut down."""
        ...

    async def stop(self, instance_uuid: str) -> None:
        """Shut a guest down, whatever it does."""
        ...

    async def reboot(self, instance_uuid: str, *, hard: bool) -> None:
        """Restart a running guest; a hard reboot takes it in any power state."""
        ...

    async def pause(self, instance_uuid: str) -> None:
        """Freeze a running guest in memory."""
        ...

    async def unpause(self, instance_uuid: str) -> None:
        """Let a paused guest run on."""
        ...

    async def suspend(self, instance_uuid: str) -> None:
        """Save a running guest's memory to disk and stop it."""
        ...

    async def resume(self, instance_uuid: str) -> None:
        """Let a suspended guest run on."""
        ...


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One effect on a guest and what it left (None: no guest). A line of the journal is one of these as JSON."""

    operation: str
    instance_uuid: str
    guest: Guest | None


class FakeDriver:
    """A simulated hypervisor.

    `operations` lists the effects it had, newest last, so that a test can count them: an operation that found its end
    reached is not among them. With a `journal` path the guests outlive the process; without, they are lost with it.
    An effect is one line written and one dictionary entry changed, with no `await` between: it is there or it is not.

    Raises: Invalid when the journal cannot be read or is damaged before its last line.
    """

    def __init__(
        self,
        hostname: str,
        settings: AgentSection,
        *,
        clock: Clock,
        randomness: random.Random,
        journal: Path | None = None,
    ) -> None:
        self.operations: deque[Operation] = deque(maxlen=OPERATIONS_REMEMBERED)
        self._hostname = hostname
        self._settings = settings
        self._clock = clock
        self._randomness = randomness
        self._journal = None if journal is None else _Journal(journal)
        self._guests: dict[str, Guest] = {} if self._journal is None else self._journal.load()

    async def resources(self) -> HostResources:
        settings = self._settings
        topology = {"sockets": settings.vcpus, "cores": 1, "threads": 1}
        processor = {"arch": "x86_64", "model": "simulated", "vendor": "Cellway", "topology": topology, "features": []}
        return HostResources(
            vcpus=settings.vcpus,
            memory_mb=settings.memory_mb,
            disk_gb=settings.disk_gb,
            cpu_allocation_ratio=settings.cpu_allocation_ratio,
            ram_allocation_ratio=settings.ram_allocation_ratio,
            disk_allocation_ratio=settings.disk_allocation_ratio,
            hypervisor_type="fake",
            hypervisor_version=1000,
            hypervisor_hostname=self._hostname,
            cpu_info=msgspec.json.encode(processor).decode(),
            host_ip="127.0.0.1",
        )

    async def inventory(self) -> Mapping[str, Guest]:
        return dict(self._guests)

    async def find(self, instance_uuid: str) -> Guest | None:
        return self._guests.get(instance_uuid)

    async def spawn(
        self, instance_uuid: str, *, name: str, vcpus: int, memory_mb: int, disk_gb: int, attempt: int
    ) -> None:
        fails = self._randomness.random() < self._settings.failure_rate
        await self._take_time()
        present = self._guests.get(instance_uuid)
        if present is not None:
            if present.attempt == attempt:
                return
            raise DriverError("The host still has this server from another build attempt.")
        if fails:
            raise DriverError("The simulated hypervisor failed to start the server.")
        guest = Guest(
            name=name,
            power_state=PowerState.RUNNING,
            vcpus=vcpus,
            memory_mb=memory_mb,
            disk_gb=disk_gb,
            attempt=attempt,
        )
        self._check_room(guest)
        self._record("spawn", instance_uuid, guest)

    async def destroy(self, instance_uuid: str) -> None:
        await self._take_time()
        if instance_uuid in self._guests:
            self._record("destroy", instance_uuid, None)

    async def start(self, instance_uuid: str) -> None:
        await self._switch("start", instance_uuid, {PowerState.SHUTDOWN, PowerState.NOSTATE}, PowerState.RUNNING)

    async def stop(self, instance_uuid: str) -> None:
        await self._switch("stop", instance_uuid, set(PowerState), PowerState.SHUTDOWN)

    async def reboot(self, instance_uuid: str, *, hard: bool) -> None:
        if hard:
            await self._switch("hard_reboot", instance_uuid, set(PowerState), PowerState.RUNNING, has_end=False)
        else:
            await self._switch("reboot", instance_uuid, {PowerState.RUNNING}, PowerState.RUNNING, has_end=False)

    async def pause(self, instance_uuid: str) -> None:
        await self._switch("pause", instance_uuid, {PowerState.RUNNING}, PowerState.PAUSED)

    async def unpause(self, instance_uuid: str) -> None:
        await self._switch("unpause", instance_uuid, {PowerState.PAUSED}, PowerState.RUNNING)

    async def suspend(self, instance_uuid: str) -> None:
        await self._switch("suspend", instance_uuid, {PowerState.RUNNING}, PowerState.SUSPENDED)

    async def resume(self, instance_uuid: str) -> None:
        await self._switch("resume", instance_uuid, {PowerState.SUSPENDED}, PowerState.RUNNING)

    async def _take_time(self) -> None:
        await self._clock.sleep(self._settings.latency_seconds)

    async def _switch(
        self,
        operation: str,
        instance_uuid: str,
        allowed: set[PowerState],
        end: PowerState,
        *,
        has_end: bool = True,
    ) -> None:
        await self._take_time()
        guest = self._guests.get(instance_uuid)
        if guest is None:
            raise DriverError(f"The host cannot {operation.replace('_', ' ')} the server: it is not there.")
        if has_end and guest.power_state == end:
            return
        if guest.power_state not in allowed:
            state = guest.power_state.name.lower()
            raise DriverError(f"The host cannot {operation.replace('_', ' ')} the server: its power state is {state}.")
        self._record(operation, instance_uuid, msgspec.structs.replace(guest, power_state=end))

    def _check_room(self, guest: Guest) -> None:
        has, present = self._settings, self._guests.values()
        rooms = (
            ("vCPUs", has.vcpus * has.cpu_allocation_ratio, guest.vcpus + sum(g.vcpus for g in present)),
            ("memory", has.memory_mb * has.ram_allocation_ratio, guest.memory_mb + sum(g.memory_mb for g in present)),
            ("disk", has.disk_gb * has.disk_allocation_ratio, guest.disk_gb + sum(g.disk_gb for g in present)),
        )
        for what, room, wanted in rooms:
            if wanted > room:
                raise DriverError(f"The host has not enough {what} for the server.")

    def _record(self, operation: str, instance_uuid: str, guest: Guest | None) -> None:
        done = Operation(operation=operation, instance_uuid=instance_uuid, guest=guest)
        if self._journal is not None:
            if self._journal.lines >= JOURNAL_LINES + len(self._guests):
                self._journal.rewrite(self._guests)
            self._journal.append(done)
        if guest is None:
            del self._guests[instance_uuid]
        else:
            self._guests[instance_uuid] = guest
        self.operations.append(done)


class _Journal:
    """The effects of a simulated hypervisor in a file, one line each, in one `write` each.

    A process that is killed tears at most the last line, which then has no newline and never took effect. Writing
    stays on the event loop: a line into the page cache takes microseconds. The file is opened anew for each line, so
    there is nothing to close.
    """

    def __init__(self, path: Path) -> None:
        self.lines = 0
        self._path = path

    def load(self) -> dict[str, Guest]:
        """Return the guests that the file's operations leave, and rewrite it with one line for each.

        Raises: Invalid when it cannot be read or written, or is damaged before its last line.
        """
        guests: dict[str, Guest] = {}
        try:
            *lines, _torn = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]
        except OSError as error:
            raise Invalid("agent.journal_unreadable", f"cannot read {self._path}: {error.strerror}") from error
        for number, line in enumerate(lines, start=1):
            try:
                done = msgspec.json.decode(line, type=Operation)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise Invalid("agent.journal_damaged", f"line {number} of {self._path} is damaged") from error
            if done.guest is None:
                guests.pop(done.instance_uuid, None)
            else:
                guests[done.instance_uuid] = done.guest
        try:
            self.rewrite(guests)
        except DriverError as error:
            raise Invalid("agent.journal_unwritable", f"cannot write {self._path}") from error
        return guests

    def append(self, done: Operation) -> None:
        """Write one operation, whole or not at all.

        Raises: DriverError.
        """
        line = msgspec.json.encode(done) + b"\n"
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                before = os.fstat(file).st_size
                if os.write(file, line) != len(line):
                    os.ftruncate(file, before)
                    raise DriverError("The host's disk is full.")
            finally:
                os.close(file)
        except OSError as error:
            raise DriverError(f"The host cannot write its journal: {error.strerror}.") from error
        self.lines += 1

    def rewrite(self, guests: Mapping[str, Guest]) -> None:
        """Replace the file by one line for each guest; a crash on the way leaves the old file.

        Raises: DriverError.
        """
        lines = [
            msgspec.json.encode(Operation(operation="keep", instance_uuid=uuid, guest=guest)) + b"\n"
            for uuid, guest in guests.items()
        ]
        new = self._path.with_name(self._path.name + ".new")
        try:
            new.touch(mode=0o600)
            new.write_bytes(b"".join(lines))
            new.replace(self._path)
        except OSError as error:
            raise DriverError(f"The host cannot write its journal: {error.strerror}.") from error
        self.lines = len(lines)
