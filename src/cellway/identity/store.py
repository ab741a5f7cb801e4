"""The users, projects, roles and token key of the built-in identity: one JSON file, mode 0600.

Used by the identity shell and by the command line's user commands. Every change is made under a file lock and
replaces the file at once, and every read notices a replaced file, so several processes may share it. The file
holds password hashes, never passwords. Not for production: a real Keystone takes this shell's place there.
"""

import asyncio
import fcntl
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import msgspec

from cellway.errors import Conflict, Invalid, NotFound, Unavailable

ADMIN = "admin"
MEMBER = "demo"
"""The two users, each in a project of the same name, that a new file holds."""

IMPLIED_ROLES = {"admin": ("admin", "member", "reader"), "member": ("member", "reader"), "reader": ("reader",)}
"""Each role with those that it implies, as Keystone's default roles do."""

PASSWORD_CHECKS_AT_ONCE = 2
"""A check takes about 27 ms of one processor and 8 MiB."""
PASSWORD_CHECKS_WAITING = 16
"""Being checked or waiting: about a quarter of a second. More are refused, so that guessing does not starve the API."""

PASSWORD_CHARACTERS = 4096
"""The longest password, as Keystone's."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
Id = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]


class PasswordHash(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A salted scrypt digest with its cost, about 27 ms and 8 MiB, so that the cost can be raised later."""

    salt: bytes
    digest: bytes
    n: int = 2**13
    r: int = 8
    p: int = 2

    def __repr__(self) -> str:
        return "PasswordHash(***)"

    @classmethod
    def of(cls, password: str) -> "PasswordHash":
        """Hash `password` with a new salt.

        Raises: Invalid for an empty or overlong password, and for one that is not text.
        """
        if not 1 <= len(password) <= PASSWORD_CHARACTERS or not _is_text(password):
            raise Invalid("identity.bad_password", f"A password has 1 to {PASSWORD_CHARACTERS} characters.")
        blank = cls(salt=secrets.token_bytes(16), digest=b"")
        return msgspec.structs.replace(blank, digest=blank._digest(password))

    def matches(self, password: str) -> bool:
        """Tell whether this is the hash of `password`."""
        return hmac.compare_digest(self.digest, self._digest(password))

    def _digest(self, password: str) -> bytes:
        memory = 256 * self.r * (self.n + self.p)
        return hashlib.scrypt(password.encode(), salt=self.salt, n=self.n, r=self.r, p=self.p, maxmem=memory, dklen=32)


class Project(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A project of the default domain."""

    id: Id
    name: Name


class Role(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A role by name."""

    id: Id
    name: Name


class User(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A user of the default domain; `grants` maps a project's id to the names of the user's roles there.

    Without a password nobody can sign in as this user.
    """

    id: Id
    name: Name
    default_project_id: Id
    grants: dict[Id, tuple[Name, ...]]
    password: PasswordHash | None = None


class _Contents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    version: int
    token_key: bytes
    roles: tuple[Role, ...]
    projects: tuple[Project, ...]
    users: tuple[User, ...]

    def __repr__(self) -> str:
        return "_Contents(***)"


class Store:
    """The file, opened; its latest contents are in memory."""

    def __init__(self, path: Path) -> None:
        """Open the file at `path`; make it, with an admin and a member who have no password yet, if there is none.

        Raises: Invalid when the file cannot be read, written or understood, or may be read by others.
        """
        self._path = path
        self._read_as: tuple[int, int, int] | None = None
        self._slots = asyncio.Semaphore(PASSWORD_CHECKS_AT_ONCE)
        self._waiting = 0
        self._nobody = PasswordHash(salt=secrets.token_bytes(16), digest=secrets.token_bytes(32))
        try:
            with locked(path):
                if not path.exists():
                    _write(path, _first_contents())
                self._refresh()
        except Unavailable as error:
            raise Invalid(error.code, error.message) from error
        except OSError as error:
            raise Invalid("identity.unwritable", f"cannot write {path}: {error.strerror}") from error

    @property
    def token_key(self) -> bytes:
        """Return the key that signs tokens.

        Raises: Unavailable when the file cannot be read, as do all methods that read it.
        """
        self._refresh()
        return self._contents.token_key

    def find_user(self, user_id: str) -> User | None:
        """Return the user with this id."""
        self._refresh()
        return self._users.get(user_id)

    def find_user_named(self, name: str) -> User | None:
        """Return the user with this name."""
        self._refresh()
        return self._users_named.get(name)

    def list_users(self) -> tuple[User, ...]:
        """Return all users, in the order they were made."""
        self._refresh()
        return self._contents.users

    def find_project(self, project_id: str) -> Project | None:
        """Return the project with this id."""
        self._refresh()
        return self._projects.get(project_id)

    async def has_project(self, project_id: str) -> bool:
        """Tell whether there is such a project."""
        return self.find_project(project_id) is not None

    def find_project_named(self, name: str) -> Project | None:
        """Return the project with this name."""
        self._refresh()
        return self._projects_named.get(name)

    def list_projects(self) -> tuple[Project, ...]:
        """Return all projects, in the order they were made."""
        self._refresh()
        return self._contents.projects

    def list_roles(self) -> tuple[Role, ...]:
        """Return all roles."""
        self._refresh()
        return self._contents.roles

    async def check_password(self, user: User | None, password: str) -> bool:
        """Tell whether `password` is the user's; an unknown user (None) takes as long as a wrong password.

        Raises: Unavailable when too many checks wait already.
        """
        if self._waiting >= PASSWORD_CHECKS_WAITING:
            raise Unavailable("identity.busy", "Too many sign-ins at once; try again in a second.")
        known = user.password if user is not None else None
        self._waiting += 1
        try:
            async with self._slots:
                matches = await asyncio.to_thread((known or self._nobody).matches, password)
        finally:
            self._waiting -= 1
        return matches and known is not None

    def create_project(self, name: str) -> Project:
        """Add a project.

        Raises: Conflict when the name is taken; Invalid for a bad name; Unavailable when the file cannot be changed.
        """
        project = Project(id=uuid4().hex, name=_checked_name(name))

        def add(old: _Contents) -> _Contents:
            if any(known.name == name for known in old.projects):
                raise Conflict("identity.project_exists", f"A project named {name} exists.", name=name)
            return msgspec.structs.replace(old, projects=(*old.projects, project))

        self._change(add)
        return project

    def create_user(self, name: str, *, project: str, role: str, password: str) -> User:
        """Add a user with one role, and those it implies, in the project of that name.

        Raises: Conflict when the name is taken; NotFound for the project; Invalid for a bad name, role or
        password; Unavailable when the file cannot be changed.
        """
        if role not in IMPLIED_ROLES:
            raise Invalid("identity.unknown_role", f"The role must be one of {', '.join(IMPLIED_ROLES)}.", role=role)
        made = self.find_project_named(project)
        if made is None:
            raise NotFound("identity.project_not_found", f"There is no project named {project}.", name=project)
        user = _new_user(_checked_name(name), made, role, PasswordHash.of(password))

        def add(old: _Contents) -> _Contents:
            if any(known.name == name for known in old.users):
                raise Conflict("identity.user_exists", f"A user named {name} exists.", name=name)
            return msgspec.structs.replace(old, users=(*old.users, user))

        self._change(add)
        return user

    def set_passwords(self, passwords: dict[str, str]) -> None:
        """Give the users of these names new passwords, all at once; their earlier tokens end.

        Raises: NotFound for a user; Invalid for a bad password; Unavailable when the file cannot be changed.
        """
        hashes = {name: PasswordHash.of(password) for name, password in passwords.items()}

        def exchange(old: _Contents) -> _Contents:
            for name in hashes.keys() - {user.name for user in old.users}:
                raise NotFound("identity.user_not_found", f"There is no user named {name}.", name=name)
            users = (
                msgspec.structs.replace(user, password=hashes[user.name]) if user.name in hashes else user
                for user in old.users
            )
            return msgspec.structs.replace(old, users=tuple(users))

        self._change(exchange)

    def _change(self, change: Callable[[_Contents], _Contents]) -> None:
        try:
            with locked(self._path):
                self._refresh()
                _write(self._path, change(self._contents))
                self._refresh()
        except OSError as error:
            raise Unavailable("identity.unwritable", f"cannot write {self._path}: {error.strerror}") from error

    def _refresh(self) -> None:
        """Read the file again if it was replaced since; a stat, about 2 µs, when it was not."""
        try:
            status = self._path.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen == self._read_as:
                return
            if status.st_mode & 0o077:
                raise Unavailable("identity.exposed", f"{self._path} may be read by others: run chmod 600 on it")
            contents = _decode(self._path.read_bytes(), self._path)
        except OSError as error:
            raise Unavailable("identity.unreadable", f"cannot read {self._path}: {error.strerror}") from error
        self._contents = contents
        self._users = {user.id: user for user in contents.users}
        self._users_named = {user.name: user for user in contents.users}
        self._projects = {project.id: project for project in contents.projects}
        self._projects_named = {project.name: project for project in contents.projects}
        self._read_as = seen


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from changing the file at `path` for the length of the block; its folder is made.

    Raises: OSError.
    """
    # A file of its own: the other one is replaced while the lock is held.
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "ab", opener=_private) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_private(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step, readable by its owner only, and on disk when this returns.

    Raises: OSError.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(path: Path, contents: _Contents) -> None:
    write_private(path, msgspec.json.format(msgspec.json.encode(contents)) + b"\n")


def _decode(document: bytes, path: Path) -> _Contents:
    try:
        contents = msgspec.json.decode(document, type=_Contents)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # The decoder names the place, never the value.
        raise Unavailable("identity.malformed", f"{path} is not a valid users file: {error}") from None
    if contents.version != 1 or len(contents.token_key) < 32:
        raise Unavailable("identity.malformed", f"{path} is of an unknown version or has no token key")
    projects = {project.id for project in contents.projects}
    roles = {role.name for role in contents.roles}
    for user in contents.users:
        if user.default_project_id not in user.grants or not user.grants.keys() <= projects:
            raise Unavailable("identity.malformed", f"{path}: user {user.name} has an unknown project, or none")
        if not roles.issuperset(chain.from_iterable(user.grants.values())):
            raise Unavailable("identity.malformed", f"{path}: user {user.name} has an unknown role")
    return contents


def _is_text(text: str) -> bool:
    # A byte of the command line that is not UTF-8 arrives as half of a surrogate pair.
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _checked_name(name: str) -> str:
    if not 1 <= len(name) <= 255 or not name.isprintable():
        raise Invalid("identity.bad_name", "A name has 1 to 255 printable characters.")
    return name


def _first_contents() -> _Contents:
    admin = Project(id=uuid4().hex, name=ADMIN)
    member = Project(id=uuid4().hex, name=MEMBER)
    return _Contents(
        version=1,
        token_key=secrets.token_bytes(32),
        roles=tuple(Role(id=uuid4().hex, name=name) for name in IMPLIED_ROLES),
        projects=(admin, member),
        users=(_new_user(ADMIN, admin, "admin", None), _new_user(MEMBER, member, "member", None)),
    )


def _new_user(name: str, project: Project, role: str, password: PasswordHash | None) -> User:
    return User(
        id=uuid4().hex,
        name=name,
        default_project_id=project.id,
        grants={project.id: IMPLIED_ROLES[role]},
        password=password,
    )
