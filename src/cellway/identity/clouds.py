"""The `clouds.yaml` that lets the `openstack` command and openstacksdk sign in to the embedded mode.

Called through `BuiltinIdentity.write_clouds` at each start. The file (0600) is the only place where the two
passwords stand; clouds and options that others have added to it are kept.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from cellway.errors import Invalid
from cellway.identity.keystone import DOMAIN, REGION
from cellway.identity.store import ADMIN, MEMBER, Store, locked, write_private

USERS = {"cellway": MEMBER, "cellway-admin": ADMIN}
"""Each cloud's user, who has a project of the same name."""

_HEADER = b"# Written by cellway. It keeps the passwords that stand here; without this file it makes new ones.\n"


def write_clouds(path: Path, store: Store, auth_url: str) -> None:
    """Put both clouds with `auth_url` in the file at `path`, keeping the passwords that it holds.

    Processes that start at once do this one after another, so all of them find the passwords that the first one made.
    A password that is missing there is made anew; a user who has none yet gets the one in the file.
    Raises: Invalid when the file cannot be read, understood or written; NotFound when a user is gone; Unavailable
    when the users' file cannot be changed.
    """
    try:
        with locked(path):
            _write_clouds(path, store, auth_url)
    except OSError as error:
        raise Invalid("clouds.unwritable", f"cannot write {path}: {error.strerror}") from error


def _write_clouds(path: Path, store: Store, auth_url: str) -> None:
    document = _read(path)
    clouds = _mapping(document, "clouds", path)
    found = {cloud: _password(_mapping(clouds, cloud, path), cloud, path) for cloud in USERS}
    passwords = {cloud: password or secrets.token_urlsafe(18) for cloud, password in found.items()}
    known = {user.name: user for user in store.list_users()}
    changed = {
        user: passwords[cloud]
        for cloud, user in USERS.items()
        if found[cloud] is None or user not in known or known[user].password is None
    }
    if changed:
        # Before the file: should this process die between the two, the next start finds no password there and
        # makes another.
        store.set_passwords(changed)
    written = {
        cloud: _cloud(clouds.get(cloud) or {}, user, passwords[cloud], auth_url) for cloud, user in USERS.items()
    }
    wanted = {**document, "clouds": {**clouds, **written}}
    if wanted != document or path.stat().st_mode & 0o077:
        write_private(path, _HEADER + msgspec.yaml.encode(wanted))


def _cloud(old: Mapping[str, Any], user: str, password: str, auth_url: str) -> dict[str, Any]:
    auth = {
        "auth_url": auth_url,
        "username": user,
        "password": password,
        "project_name": user,
        "user_domain_id": DOMAIN.id,
        "project_domain_id": DOMAIN.id,
    }
    ours = {"auth_type": "password", "region_name": REGION, "identity_api_version": 3}
    return {**old, **ours, "auth": {**(old.get("auth") or {}), **auth}}


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Invalid("clouds.unreadable", f"cannot read {path}: {error.strerror}") from error
    try:
        document = msgspec.yaml.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError):
        # The decoder's message quotes the file.
        raise Invalid("clouds.malformed", f"{path} is not valid YAML: mend it, or move it away") from None
    return _mapping({"": document}, "", path)


def _mapping(parent: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Invalid("clouds.malformed", f"{path} is not a clouds.yaml: mend it, or move it away")
    return value


def _password(cloud: Mapping[str, Any], name: str, path: Path) -> str | None:
    password = _mapping(cloud, "auth", path).get("password")
    if password is not None and not isinstance(password, str):
        raise Invalid("clouds.malformed", f"{path}: put the password of cloud {name} in quotes")
    return password or None
