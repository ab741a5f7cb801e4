"""Signed, expiring tokens of the built-in identity, and their verifier.

`Tokens` is the `TokenVerifier` of the embedded mode: any process that opens the same users' file verifies its
tokens. A token names a user and a project; names and roles are looked up when it is verified, so a role that is
taken away, or a changed password, ends it (within the cache time). Tokens never enter a log or a `repr`.
"""

import binascii
import hmac
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import NamedTuple

import msgspec
from cachetools import TTLCache

from cellway.config import Limits
from cellway.context import Clock
from cellway.errors import Unavailable
from cellway.identity.store import PasswordHash, Project, Store, User
from cellway.ids import ProjectId, UserId
from cellway.outside import Identity

TOKEN_CHARACTERS = 512
"""Twice the length of the longest token that this module makes."""

REVOCATIONS = 65536
"""Revoked tokens remembered until they would have expired, about 10 MB."""

_VERSION = b"\x01"
_MAC_BYTES = 32


class Claims(msgspec.Struct, frozen=True, array_like=True):
    """What a token says, in the order it is packed. `stamp` changes with the user's password."""

    user_id: str
    project_id: str
    methods: tuple[str, ...]
    issued_at: datetime
    expires_at: datetime
    audit_ids: tuple[str, ...]
    stamp: bytes


class Verified(NamedTuple):
    """A token that is good now: what it says, and what the file says of its user and project."""

    claims: Claims
    identity: Identity


class Tokens:
    """Makes, verifies and revokes tokens. Revocations live in this process only and end when it does."""

    def __init__(self, store: Store, *, limits: Limits, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._life = timedelta(seconds=limits.token_seconds)
        timer: Callable[[], float] = clock.monotonic
        self._cache: TTLCache[str, Verified] = TTLCache(
            limits.token_cache_entries, limits.token_cache_seconds, timer=timer
        )
        self._revoked: dict[str, datetime] = {}

    def issue(self, user: User, project: Project, parent: Claims | None = None) -> tuple[str, Claims]:
        """Return a new token for `user` in `project`; one made from a `parent` token expires with it.

        Raises: Unavailable when the users' file cannot be read.
        """
        now = self._now()
        audit_id = secrets.token_urlsafe(12)
        claims = Claims(
            user_id=user.id,
            project_id=project.id,
            methods=("password",) if parent is None else ("password", "token"),
            issued_at=now,
            expires_at=now + self._life if parent is None else parent.expires_at,
            # The chain is its newest and its first link, as Keystone's.
            audit_ids=(audit_id,) if parent is None else (audit_id, parent.audit_ids[-1]),
            stamp=_stamp(user.password),
        )
        signed = _VERSION + msgspec.msgpack.encode(claims)
        return _text(self._mac(signed) + signed), claims

    async def verify(self, token: str) -> Identity | None:
        """Return who holds `token`, or None when it is invalid, expired or revoked.

        Raises: Unavailable when the users' file cannot be read.
        """
        verified = self.inspect(token)
        return None if verified is None else verified.identity

    def inspect(self, token: str) -> Verified | None:
        """Return all that is known of a good token, or None.

        Raises: Unavailable when the users' file cannot be read.
        """
        verified = self._cache.get(token)
        if verified is None:
            verified = self._read(token)
            if verified is None:
                return None
            self._cache[token] = verified
        claims = verified.claims
        if claims.expires_at <= self._now() or claims.audit_ids[0] in self._revoked:
            return None
        return verified

    def revoke(self, claims: Claims) -> None:
        """Refuse this token from now on, in this process.

        Raises: Unavailable when too many unexpired tokens are revoked already.
        """
        if len(self._revoked) >= REVOCATIONS:
            now = self._now()
            self._revoked = {audit_id: until for audit_id, until in self._revoked.items() if until > now}
            if len(self._revoked) >= REVOCATIONS:
                raise Unavailable("identity.too_many_revocations", "Too many tokens are revoked; try again later.")
        self._revoked[claims.audit_ids[0]] = claims.expires_at

    def _read(self, token: str) -> Verified | None:
        if len(token) > TOKEN_CHARACTERS:
            return None
        try:
            packed = urlsafe_b64decode(token + "=" * (-len(token) % 4))
        except (binascii.Error, ValueError):
            return None
        # The decoder skips what is not base64; one token has one spelling.
        if _text(packed) != token:
            return None
        mac, signed = packed[:_MAC_BYTES], packed[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(signed)) or not signed.startswith(_VERSION):
            return None
        # Signed by us, so it decodes.
        claims = msgspec.msgpack.decode(signed[len(_VERSION) :], type=Claims)
        user = self._store.find_user(claims.user_id)
        project = self._store.find_project(claims.project_id)
        if user is None or project is None or claims.stamp != _stamp(user.password):
            return None
        roles = user.grants.get(project.id)
        if roles is None:
            return None
        identity = Identity(
            user_id=UserId(user.id),
            user_name=user.name,
            project_id=ProjectId(project.id),
            project_name=project.name,
            roles=frozenset(roles),
        )
        return Verified(claims, identity)

    def _mac(self, signed: bytes) -> bytes:
        return hmac.digest(self._store.token_key, signed, "sha256")

    def _now(self) -> datetime:
        return self._clock.now().replace(tzinfo=UTC)


def _text(packed: bytes) -> str:
    return urlsafe_b64encode(packed).decode("ascii").rstrip("=")


def _stamp(password: PasswordHash | None) -> bytes:
    return sha256(password.salt if password is not None else b"").digest()[:8]
