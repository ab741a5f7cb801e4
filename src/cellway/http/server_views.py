"""How a server is shown, at every microversion."""

import hashlib
from typing import Any

import msgspec

from cellway.flavors import from_stored
from cellway.http.wire import Call, long_stamp, stamp
from cellway.instances.records import Instance, TaskState, VmState

_BUSY_STATUS = {
    TaskState.REBOOTING.value: "REBOOT",
    TaskState.REBOOTING_HARD.value: "HARD_REBOOT",
}
_STATUS = {
    VmState.ACTIVE.value: "ACTIVE",
    VmState.BUILDING.value: "BUILD",
    VmState.DELETED.value: "DELETED",
    VmState.ERROR.value: "ERROR",
    VmState.PAUSED.value: "PAUSED",
    VmState.STOPPED.value: "SHUTOFF",
    VmState.SUSPENDED.value: "SUSPENDED",
}


def status_of(instance: Instance) -> str:
    """Return the status that users see."""
    if instance.task_state in _BUSY_STATUS and instance.vm_state != VmState.ERROR:
        return _BUSY_STATUS[instance.task_state]
    return _STATUS.get(instance.vm_state, "UNKNOWN")


def summary(call: Call, instance: Instance) -> dict[str, Any]:
    """Return what a list without details shows of a server."""
    return {"id": instance.uuid, "name": instance.display_name, "links": call.links("servers", instance.uuid)}


def _flavor(call: Call, stored: str, with_specs: bool) -> dict[str, Any]:
    flavor = from_stored(stored)
    if call.version < 47:
        return {"id": flavor.flavorid, "links": call.bookmark("flavors", flavor.flavorid)}
    view: dict[str, Any] = {
        "vcpus": flavor.vcpus,
        "ram": flavor.memory_mb,
        "disk": flavor.root_gb,
        "ephemeral": flavor.ephemeral_gb,
        "swap": flavor.swap,
        "original_name": flavor.name,
    }
    if with_specs:
        view["extra_specs"] = flavor.extra_specs
    return view


class _FixedIp(msgspec.Struct):
    address: str
    version: int = 4
    type: str = "fixed"


class _Subnet(msgspec.Struct):
    ips: list[_FixedIp] = []


class _Network(msgspec.Struct):
    label: str | None = None
    subnets: list[_Subnet] = []


class _Interface(msgspec.Struct):
    network: _Network
    address: str | None = None


def addresses_of(instance: Instance) -> dict[str, list[dict[str, Any]]]:
    """Return the addresses by network, from the JSON of `instance_info_caches.network_info`."""
    if not instance.network_info or instance.network_info == "[]":
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    for interface in msgspec.json.decode(instance.network_info, type=list[_Interface]):
        listed = found.setdefault(interface.network.label or "", [])
        for subnet in interface.network.subnets:
            for ip in subnet.ips:
                listed.append(
                    {
                        "addr": ip.address,
                        "version": ip.version,
                        "OS-EXT-IPS:type": ip.type,
                        "OS-EXT-IPS-MAC:mac_addr": interface.address,
                    }
                )
    return found


def _host_id(instance: Instance) -> str:
    if instance.host is None:
        return ""
    return hashlib.sha224((instance.project_id + instance.host).encode()).hexdigest()


class Viewer:
    """Makes the full view; what depends on the caller alone is decided once, not per server."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._admin = call.allows("os_compute_api:os-extended-server-attributes")
        self._host_status = call.version >= 16 and call.allows("os_compute_api:servers:show:host_status")
        self._specs = call.allows("os_compute_api:servers:show:flavor-extra-specs")
        self._flavors: dict[str, dict[str, Any]] = {}

    def view(self, instance: Instance) -> dict[str, Any]:
        """Return a server as the call's microversion shows it."""
        call, version = self._call, self._call.version
        status = status_of(instance)
        image: Any = ""
        if instance.image_ref:
            image = {"id": instance.image_ref, "links": call.bookmark("images", instance.image_ref)}
        view: dict[str, Any] = {
            "id": instance.uuid,
            "name": instance.display_name,
            "status": status,
            "tenant_id": instance.project_id,
            "user_id": instance.user_id,
            "metadata": instance.metadata,
            "hostId": _host_id(instance),
            "image": image,
            "flavor": self._flavor(instance.flavor),
            "created": stamp(instance.created_at),
            "updated": stamp(instance.updated_at or instance.created_at),
            "addresses": addresses_of(instance),
            "accessIPv4": instance.access_ip_v4 or "",
            "accessIPv6": instance.access_ip_v6 or "",
            "links": call.links("servers", instance.uuid),
            "OS-DCF:diskConfig": "AUTO" if instance.auto_disk_config else "MANUAL",
            "OS-EXT-AZ:availability_zone": instance.availability_zone or self._zone(instance),
            "config_drive": instance.config_drive or "",
            "key_name": instance.key_name,
            "OS-SRV-USG:launched_at": long_stamp(instance.launched_at),
            "OS-SRV-USG:terminated_at": long_stamp(instance.terminated_at),
            "OS-EXT-STS:task_state": instance.task_state,
            "OS-EXT-STS:vm_state": instance.vm_state,
            "OS-EXT-STS:power_state": instance.power_state,
            "os-extended-volumes:volumes_attached": [],
        }
        if status in ("ACTIVE", "BUILD"):
            view["progress"] = 100 if status == "ACTIVE" else instance.progress
        if instance.fault is not None and status in ("ERROR", "DELETED"):
            view["fault"] = self._fault(instance)
        if self._admin:
            self._add_admin(view, instance)
        if version >= 9:
            view["locked"] = instance.locked
        if self._host_status:
            view["host_status"] = "" if instance.host is None else call.services.hosts.status_of(instance.host)
        if version >= 19:
            view["description"] = instance.display_description
        if version >= 26:
            view["tags"] = instance.tags
        return view

    def _flavor(self, stored: str) -> dict[str, Any]:
        # The servers of a page have few flavors between them.
        view = self._flavors.get(stored)
        if view is None:
            view = self._flavors[stored] = _flavor(self._call, stored, self._specs)
        return view

    def _zone(self, instance: Instance) -> str:
        return "" if instance.host is None else self._call.services.hosts.zone_of(instance.host)

    def _fault(self, instance: Instance) -> dict[str, Any]:
        fault = instance.fault
        assert fault is not None
        view: dict[str, Any] = {"code": fault.code, "created": stamp(fault.created_at), "message": fault.message}
        if fault.details and self._admin:
            view["details"] = fault.details
        return view

    def _add_admin(self, view: dict[str, Any], instance: Instance) -> None:
        prefix = "OS-EXT-SRV-ATTR:"
        view[prefix + "host"] = instance.host
        view[prefix + "hypervisor_hostname"] = instance.node
        view[prefix + "instance_name"] = f"instance-{instance.uuid[:8]}"
        if self._call.version >= 3:
            view[prefix + "hostname"] = instance.hostname
            view[prefix + "kernel_id"] = ""
            view[prefix + "ramdisk_id"] = ""
            view[prefix + "launch_index"] = instance.launch_index
            view[prefix + "reservation_id"] = instance.reservation_id
            view[prefix + "root_device_name"] = instance.root_device_name
            view[prefix + "user_data"] = instance.user_data


def full_view(call: Call, instance: Instance) -> dict[str, Any]:
    """Return a server as the call's microversion shows it."""
    return Viewer(call).view(instance)
