"""Every method that crosses a queue, with its payload and its answer: the whole contract on one page.

Agents consume `compute.HOST`, conductors consume `conductor`, each on the queue of its own cell. A method with
an answer is called; one without is cast. Adding a field: give it a default, so that an older sender is understood.
What a receiver decodes fits into the databases' columns: numbers are bounded here, texts by what looks them up.
"""

from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

import msgspec

RequestT = TypeVar("RequestT", bound=msgspec.Struct)
ReplyT = TypeVar("ReplyT", bound=msgspec.Struct)

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Ratio = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]

CONDUCTOR = "conductor"


def host_address(host: str) -> str:
    """Return the address that the agent of `host` consumes."""
    return f"compute.{host}"


@dataclass(frozen=True, slots=True)
class CallMethod(Generic[RequestT, ReplyT]):
    """A method that answers."""

    name: str
    request: type[RequestT]
    reply: type[ReplyT]


@dataclass(frozen=True, slots=True)
class CastMethod(Generic[RequestT]):
    """A method that does not answer; it may arrive more than once, and takes effect once."""

    name: str
    request: type[RequestT]


class Payload(msgspec.Struct, frozen=True, kw_only=True):
    """What a method carries."""


class Done(Payload, frozen=True, kw_only=True):
    """The answer of a conditional write: False means that it was refused because something newer stands there."""

    accepted: bool


# ---- to an agent -----------------------------------------------------------------------------------------------


class BuildInstance(Payload, frozen=True, kw_only=True):
    """Build a server here, if the conductor still agrees that `attempt` is the one that counts."""

    instance_uuid: str
    attempt: Count
    name: str
    vcpus: Count
    memory_mb: Count
    disk_gb: Count


class ActOnInstance(Payload, frozen=True, kw_only=True):
    """Carry out the action that the API has recorded for the server under this context's request id.

    `action` is one of the driver's operations: start, stop, reboot, hard_reboot, pause, unpause, suspend, resume.
    """

    instance_uuid: str
    action: str


class DestroyInstance(Payload, frozen=True, kw_only=True):
    """Remove the server from this host. With `attempt`, only the remains of that build attempt; None deletes the
    server.
    """

    instance_uuid: str
    attempt: Count | None = None


BUILD_INSTANCE = CastMethod("build_instance", BuildInstance)
ACT_ON_INSTANCE = CastMethod("act_on_instance", ActOnInstance)
DESTROY_INSTANCE = CastMethod("destroy_instance", DestroyInstance)

# ---- to a conductor --------------------------------------------------------------------------------------------


class HostResources(Payload, frozen=True, kw_only=True):
    """What a host has. `memory_mb` and `disk_gb` are totals; the ratios say how far each may be promised."""

    vcpus: Count
    memory_mb: Count
    disk_gb: Count
    cpu_allocation_ratio: Ratio
    ram_allocation_ratio: Ratio
    disk_allocation_ratio: Ratio
    hypervisor_type: str
    hypervisor_version: Count
    hypervisor_hostname: str
    cpu_info: str
    host_ip: str


class RegisterHost(Payload, frozen=True, kw_only=True):
    """An agent starts. The conductor gives it a new epoch; reports of lower epochs are refused from then on."""

    host: str
    resources: HostResources
    version: Count = 1


class AssignedInstance(Payload, frozen=True, kw_only=True):
    """A server that the cell's database places on the host.

    `action` and `request_id` are set when an action was recorded for it and never started: the agent does it now.
    `attempt` is 0 for a server that this system did not build.
    """

    instance_uuid: str
    name: str
    vm_state: str
    task_state: str | None
    attempt: Count
    vcpus: Count
    memory_mb: Count
    disk_gb: Count
    action: str | None = None
    request_id: str | None = None


class Registered(Payload, frozen=True, kw_only=True):
    """The agent's epoch, and every live server of the host."""

    epoch: Count
    instances: tuple[AssignedInstance, ...]


class HostReport(Payload, frozen=True, kw_only=True):
    """A heartbeat. `sequence` grows by one with each; what the host uses is what its driver says."""

    host: str
    epoch: Count
    sequence: Count
    running: Count
    vcpus_used: Count
    memory_mb_used: Count
    disk_gb_used: Count


class StartBuild(Payload, frozen=True, kw_only=True):
    """May this host build this attempt? Accepted once per epoch, and only for the highest attempt."""

    host: str
    epoch: Count
    instance_uuid: str
    attempt: Count


class FinishBuild(Payload, frozen=True, kw_only=True):
    """How a build ended. `failure` is None for success, else a sentence for people."""

    host: str
    epoch: Count
    sequence: Count
    instance_uuid: str
    attempt: Count
    failure: str | None = None


class StartAction(Payload, frozen=True, kw_only=True):
    """May this host carry out the action recorded under `request_id`? Accepted once."""

    host: str
    epoch: Count
    instance_uuid: str
    request_id: str
    action: str


class FinishAction(Payload, frozen=True, kw_only=True):
    """How an action ended. `power_state` is the driver's, in the incumbent's numbers (1 running, 3 paused, 4 off, 7
    suspended).
    """

    host: str
    epoch: Count
    sequence: Count
    instance_uuid: str
    request_id: str
    action: str
    power_state: Count
    failure: str | None = None


class InstanceDestroyed(Payload, frozen=True, kw_only=True):
    """The driver no longer runs the server, whose deletion was asked for."""

    host: str
    epoch: Count
    instance_uuid: str


REGISTER_HOST = CallMethod("register_host", RegisterHost, Registered)
HOST_REPORT = CallMethod("host_report", HostReport, Done)
START_BUILD = CallMethod("start_build", StartBuild, Done)
FINISH_BUILD = CallMethod("finish_build", FinishBuild, Done)
START_ACTION = CallMethod("start_action", StartAction, Done)
FINISH_ACTION = CallMethod("finish_action", FinishAction, Done)
INSTANCE_DESTROYED = CallMethod("instance_destroyed", InstanceDestroyed, Done)
