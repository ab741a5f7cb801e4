"""Keypairs: the public keys that users keep here to be put into their servers.

Nouns over the API database; the verbs and `http/keypairs.py` call them. A keypair belongs to a user, not to a project.
Only public halves ever come here: no private key is made, stored or logged. Seed: none of its own.
"""

import base64
import binascii
import hashlib
import re
import ssl
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec
import sqlalchemy as sa

from cellway.db.api_tables import key_pairs
from cellway.db.transaction import ApiTx, unique_violation
from cellway.errors import Conflict, Invalid, NotFound

Kind = Literal["ssh", "x509"]


class KeyPair(msgspec.Struct, frozen=True, kw_only=True):
    """A user's public key."""

    id: int
    user_id: str
    name: str
    type: str
    fingerprint: str
    public_key: str
    created_at: datetime | None
    updated_at: datetime | None


# ---- queries ---------------------------------------------------------------------------------------------------

_OF_USER = sa.select(key_pairs).where(key_pairs.c.user_id == sa.bindparam("user"))
_GET = _OF_USER.where(key_pairs.c.name == sa.bindparam("name"))
_LIST = _OF_USER.order_by(key_pairs.c.name).limit(sa.bindparam("limit", type_=sa.Integer))
_LIST_AFTER = _LIST.where(key_pairs.c.name > sa.bindparam("marker"))
_COUNT = sa.select(sa.func.count()).select_from(key_pairs).where(key_pairs.c.user_id == sa.bindparam("user"))
_INSERT = sa.insert(key_pairs)
_DELETE = sa.delete(key_pairs).where(
    key_pairs.c.user_id == sa.bindparam("user"), key_pairs.c.name == sa.bindparam("name")
)


def get(tx: ApiTx, user_id: str, name: str) -> KeyPair:
    """Return a user's keypair.

    Raises: NotFound.
    """
    row = tx.execute(_GET, {"user": user_id, "name": name}).one_or_none()
    if row is None:
        raise _not_found(user_id, name)
    return _keypair(row)


def list(tx: ApiTx, user_id: str, *, limit: int, marker: str | None = None) -> Sequence[KeyPair]:
    """Return at most `limit` of a user's keypairs by name, those after the one named `marker`.

    Raises: Invalid when the marker is no keypair of the user.
    """
    if marker is None:
        return [_keypair(row) for row in tx.execute(_LIST, {"user": user_id, "limit": limit})]
    if tx.execute(_GET, {"user": user_id, "name": marker}).one_or_none() is None:
        raise Invalid("keypair.bad_marker", f"Marker {marker} could not be found.", marker=marker)
    return [_keypair(row) for row in tx.execute(_LIST_AFTER, {"user": user_id, "limit": limit, "marker": marker})]


def count(tx: ApiTx, user_id: str) -> int:
    """Return how many a user has."""
    return int(tx.execute(_COUNT, {"user": user_id}).scalar_one())


def create(tx: ApiTx, user_id: str, name: str, public_key: str, kind: Kind = "ssh") -> KeyPair:
    """Keep a public key: a line of OpenSSH's, or a certificate in PEM form.

    Raises: Invalid for a key that is neither; Conflict when the user has a keypair of that name.
    """
    values = {
        "created_at": tx.now,
        "user_id": user_id,
        "name": name,
        "type": kind,
        "fingerprint": fingerprint(public_key, kind),
        "public_key": public_key,
    }
    with unique_violation(Conflict("keypair.exists", f"Key pair '{name}' already exists.", keypair=name)):
        tx.execute(_INSERT, values)
    return get(tx, user_id, name)


def delete(tx: ApiTx, user_id: str, name: str) -> None:
    """Remove a user's keypair; servers that have the key keep it.

    Raises: NotFound.
    """
    if not tx.execute(_DELETE, {"user": user_id, "name": name}).rowcount:
        raise _not_found(user_id, name)


def _keypair(row: sa.Row[Any]) -> KeyPair:
    return KeyPair(
        id=row.id,
        user_id=row.user_id,
        name=row.name,
        type=row.type,
        fingerprint=row.fingerprint or "",
        public_key=row.public_key or "",
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def _not_found(user_id: str, name: str) -> NotFound:
    return NotFound("keypair.not_found", f"Keypair {name} not found for user {user_id}", keypair=name, user=user_id)


# ---- keys ------------------------------------------------------------------------------------------------------

_MOST_BYTES = 16384
"""A public key: the largest RSA keys in use are under 3 KiB, and a certificate is a few; the column holds 64 KiB."""

_SSH_LINE = re.compile(r"(?P<kind>\S+)[ \t]+(?P<blob>\S+)([ \t][^\x00-\x08\x0a-\x1f\x7f]*)?")
_SSH_FIELDS = {
    "ssh-rsa": 2,
    "ssh-dss": 4,
    "ssh-ed25519": 1,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
    "sk-ssh-ed25519@openssh.com": 2,
    "sk-ecdsa-sha2-nistp256@openssh.com": 3,
}
"""The kinds of OpenSSH key, and how many fields of each follow its name in the key itself (RFC 4253, section 6.6)."""

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----(?P<blob>[A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")


def fingerprint(public_key: str, kind: Kind) -> str:
    """Return the fingerprint by which clients know a key: MD5 of an SSH key, SHA-1 of a certificate, in hex pairs.

    Raises: Invalid for what is not a public key of that kind.
    """
    if len(public_key.encode()) > _MOST_BYTES:
        raise _bad_key(f"a public key has at most {_MOST_BYTES} bytes")
    if kind == "ssh":
        return hashlib.md5(_ssh_key(public_key), usedforsecurity=False).digest().hex(":")
    return hashlib.sha1(_certificate(public_key), usedforsecurity=False).digest().hex(":")


def _ssh_key(line: str) -> bytes:
    """Return the key within one line `KIND BASE64 COMMENT`, which is all that an authorized_keys file may be given."""
    found = _SSH_LINE.fullmatch(line.strip())
    if found is None or found["kind"] not in _SSH_FIELDS:
        raise _bad_key(f"it must be one line that begins with one of {', '.join(_SSH_FIELDS)}")
    kind, blob = found["kind"], _decode(found["blob"])
    fields = []
    at = 0
    while at < len(blob):
        start = at + 4
        at = start + int.from_bytes(blob[at:start])
        fields.append(blob[start:at])
    if at != len(blob) or not all(fields) or fields[:1] != [kind.encode()] or len(fields) != 1 + _SSH_FIELDS[kind]:
        raise _bad_key(f"what follows {kind} is not a key of that kind")
    return blob


def _certificate(text: str) -> bytes:
    """Return the first certificate of a PEM text, in binary form; OpenSSL says whether it is one."""
    found = _CERTIFICATE.search(text)
    if found is None:
        raise _bad_key("it must be an X.509 certificate in PEM form")
    certificate = _decode("".join(found["blob"].split()))
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=certificate)
    except (ssl.SSLError, ValueError) as error:
        raise _bad_key("it is not an X.509 certificate") from error
    return certificate


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad_key("it is not valid base64") from error


def _bad_key(reason: str) -> Invalid:
    return Invalid("keypair.bad_key", f"Keypair data is invalid: {reason}")
