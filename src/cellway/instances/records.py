"""The shape of an instance, and the words for its states.

The same record is read from a cell and kept, as JSON, in a build request while no cell has the instance yet.
The state words and power numbers are the incumbent's, since its databases hold them.
"""

from datetime import datetime
from enum import IntEnum, StrEnum

import msgspec


class VmState(StrEnum):
    """What an instance is."""

    BUILDING = "building"
    ACTIVE = "active"
    STOPPED = "stopped"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    ERROR = "error"
    DELETED = "deleted"


class TaskState(StrEnum):
    """What is being done to it now."""

    SCHEDULING = "scheduling"
    SPAWNING = "spawning"
    POWERING_ON = "powering-on"
    POWERING_OFF = "powering-off"
    REBOOTING = "rebooting"
    REBOOTING_HARD = "rebooting_hard"
    PAUSING = "pausing"
    UNPAUSING = "unpausing"
    SUSPENDING = "suspending"
    RESUMING = "resuming"
    DELETING = "deleting"


class PowerState(IntEnum):
    """What the hypervisor says."""

    NOSTATE = 0
    RUNNING = 1
    PAUSED = 3
    SHUTDOWN = 4
    SUSPENDED = 7


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Why an instance is in ERROR: `message` is for its owner, `details` for an admin."""

    code: int
    message: str
    details: str | None
    created_at: datetime


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """An instance. `flavor` is the JSON of `instance_extra.flavor`; times are naive UTC."""

    uuid: str
    project_id: str
    user_id: str
    display_name: str
    created_at: datetime
    flavor: str
    vcpus: int
    memory_mb: int
    root_gb: int
    ephemeral_gb: int = 0
    instance_type_id: int | None = None
    display_description: str | None = None
    hostname: str | None = None
    image_ref: str | None = None
    key_name: str | None = None
    key_data: str | None = None
    user_data: str | None = None
    reservation_id: str | None = None
    launch_index: int = 0
    availability_zone: str | None = None
    config_drive: str | None = None
    auto_disk_config: bool = False
    access_ip_v4: str | None = None
    access_ip_v6: str | None = None
    root_device_name: str | None = None
    vm_state: str = VmState.BUILDING
    task_state: str | None = TaskState.SCHEDULING
    power_state: int = PowerState.NOSTATE
    host: str | None = None
    node: str | None = None
    locked: bool = False
    locked_by: str | None = None
    progress: int = 0
    updated_at: datetime | None = None
    launched_at: datetime | None = None
    terminated_at: datetime | None = None
    deleted: bool = False
    network_info: str | None = None
    metadata: dict[str, str] = {}
    tags: tuple[str, ...] = ()
    fault: Fault | None = None

    @property
    def disk_gb(self) -> int:
        """All the disk that it takes."""
        return self.root_gb + self.ephemeral_gb
