"""Keypairs on a real API database: whose they are, pages, fingerprints, and which keys are refused."""

import base64
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from cellway import keypairs
from cellway.config import Secret
from cellway.db.schema import Tree
from cellway.db.transaction import ApiTx
from cellway.errors import Conflict, Invalid, NotFound
from cellway.keypairs import Kind
from tests.databases import KINDS, Shelf, engine_of, upgraded

NOW = datetime(2026, 3, 1, 12, 30, 15)

ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAID6APKzzC2JyNoTjvjfnCdbFp2TweynzQGWoBrN6jsar alice@example.org"
ED25519_MD5 = "ca:e1:d3:c7:89:7f:e5:e0:e9:9e:fd:fc:b0:1c:ec:b1"
# The incumbent's own sample, doc/api_samples/os-keypairs/v2.10/keypairs-import-post-resp.json.
RSA = (
    "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQDx8nkQv/zgGgB4rMYmIf+6A4l6Rr+o/6lHBQdW5aYd44bd8JttDCE/F/pNRr0lRE+PiqSPO8nD"
    "PHw0010JeMH9gYgnnFlyY3/OcJ02RhIPyyxYpv9FhY+2YiUkpwFOcLImyrxEsYXpD/0d3ac30bNH6Sw9JD9UZHYcpSxsIbECHw== "
    "Generated-by-Nova"
)
RSA_MD5 = "1e:2c:9b:56:79:4b:45:77:f9:ca:7a:98:2c:b0:d5:3c"
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBZTCCAQqgAwIBAgIBATAKBggqhkjOPQQDAjAQMQ4wDAYDVQQDDAVhbGljZTAg
Fw0yNjExMjEwMzMyMjBaGA8yMTI2MTAyODAzMzIyMFowEDEOMAwGA1UEAwwFYWxp
Y2UwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARglbIrV3XO0DkOTA/KR7wUKZCu
Lz3/ih2nCGGKOO1UF3FdGGrRZ/rcKxsT5lRopugeXH4y9F167RNhls5FZZW+o1Mw
UTAdBgNVHQ4EFgQUJ+yBRTveUxf7GCDcgyC595gZS+kwHwYDVR0jBBgwFoAUJ+yB
RTveUxf7GCDcgyC595gZS+kwDwYDVR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNJ
ADBGAiEAwrDnsSoEP1fnvO+qJTDeMe/HwSqRCVygDQvcu3bDWKQCIQDb8iX96lRS
lwFppVEevgnA5EpWk3LBR+IZd3ry7OiK7A==
-----END CERTIFICATE-----
"""
CERTIFICATE_SHA1 = "5f:31:10:77:76:f8:e4:d3:9a:13:79:76:88:cc:ee:a0:bf:11:12:43"


@pytest.fixture(scope="module", params=KINDS)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shelf: Shelf
) -> Iterator[sa.Engine]:
    """Give an API database of each kind for the module; every test rolls back what it wrote."""
    if request.param == "sqlite":
        url = upgraded(Secret(f"sqlite:///{tmp_path_factory.mktemp('keypairs') / 'api.sqlite'}"), Tree.API)
    else:
        url = shelf.take(request.param, "api")
    made = engine_of(url)
    yield made
    made.dispose()


@pytest.fixture
def tx(engine: sa.Engine) -> Iterator[ApiTx]:
    """Open a transaction that leaves nothing behind."""
    with engine.connect() as connection, connection.begin() as transaction:
        yield ApiTx(connection, NOW)
        transaction.rollback()


def test_a_keypair_reads_back_as_it_was_made(tx: ApiTx) -> None:
    """What create returns is what get returns: the key as it was sent, its fingerprint and the time."""
    made = keypairs.create(tx, "alice", "laptop", ED25519)
    assert made == keypairs.get(tx, "alice", "laptop")
    assert (made.user_id, made.name, made.type) == ("alice", "laptop", "ssh")
    assert (made.public_key, made.fingerprint) == (ED25519, ED25519_MD5)
    assert (made.created_at, made.updated_at) == (NOW, None)


def test_a_name_is_a_users_own(tx: ApiTx) -> None:
    """Two users may use one name, one user may not use it twice, and each gets and deletes only their own."""
    keypairs.create(tx, "alice", "k", ED25519)
    keypairs.create(tx, "bob", "k", RSA)
    with pytest.raises(Conflict, match=r"^Key pair 'k' already exists\.$"), tx.connection.begin_nested():
        keypairs.create(tx, "alice", "k", RSA)
    assert keypairs.get(tx, "bob", "k").fingerprint == RSA_MD5
    keypairs.delete(tx, "bob", "k")
    assert keypairs.get(tx, "alice", "k").fingerprint == ED25519_MD5
    for missing in (keypairs.get, keypairs.delete):
        with pytest.raises(NotFound, match=r"^Keypair k not found for user bob$"):
            missing(tx, "bob", "k")


def test_pages_follow_names(tx: ApiTx) -> None:
    """Following markers gives each of the user's keypairs once, by name, and nobody else's."""
    for name in ("c", "a", "e", "b", "d"):
        keypairs.create(tx, "alice", name, ED25519)
    keypairs.create(tx, "bob", "aa", ED25519)
    paged: list[str] = []
    while page := keypairs.list(tx, "alice", limit=2, marker=paged[-1] if paged else None):
        assert len(page) <= 2
        paged += [keypair.name for keypair in page]
    assert paged == ["a", "b", "c", "d", "e"]


def test_a_marker_that_is_not_the_users_is_refused(tx: ApiTx) -> None:
    """A marker that names no keypair of the user is Invalid."""
    keypairs.create(tx, "bob", "k", ED25519)
    with pytest.raises(Invalid, match=r"^Marker k could not be found\.$"):
        keypairs.list(tx, "alice", limit=2, marker="k")


# ---- keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "kind", "fingerprint"),
    [
        (ED25519, "ssh", ED25519_MD5),
        (RSA, "ssh", RSA_MD5),
        (f"{ED25519}\n", "ssh", ED25519_MD5),
        (" ".join(ED25519.split()[:2]), "ssh", ED25519_MD5),
        (f"{ED25519} a comment of several words, é", "ssh", ED25519_MD5),
        (CERTIFICATE, "x509", CERTIFICATE_SHA1),
        (f"Subject: alice\n{CERTIFICATE}", "x509", CERTIFICATE_SHA1),
    ],
)
def test_fingerprints_are_those_of_the_usual_tools(key: str, kind: Kind, fingerprint: str) -> None:
    """MD5 as `ssh-keygen -l -E md5` prints it, SHA-1 as `openssl x509 -fingerprint` does."""
    assert keypairs.fingerprint(key, kind) == fingerprint


def wire(*fields: bytes) -> str:
    """Return base64 of SSH strings."""
    return base64.b64encode(b"".join(len(field).to_bytes(4) + field for field in fields)).decode()


@pytest.mark.parametrize(
    "key",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 ====",
        "ssh-ed25519 AAAA",
        "ssh-ed25519 !!!!",
        "ssh-ed25519 é",
        ED25519.replace("ssh-ed25519", "ssh-rsa"),
        ED25519.replace("ssh-ed25519", "ssh-made-up"),
        f"ssh-ed25519 {wire(b'ssh-ed25519')}",
        f"ssh-ed25519 {wire(b'ssh-ed25519', b'')}",
        f"ssh-ed25519 {wire(b'ssh-ed25519', b'x', b'y')}",
        f"ssh-ed25519 {wire(b'ssh-ed25519', b'x')[:-4]}",
        f"{ED25519}\n{RSA}",
        f"{ED25519}\rcommand",
        f"{ED25519}\x00",
        f'command="sh" {ED25519}',
        f"{ED25519} {'x' * 20000}",
        CERTIFICATE,
        "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA\n-----END OPENSSH PRIVATE KEY-----\n",
    ],
)
def test_what_is_no_ssh_public_key_is_refused(tx: ApiTx, key: str) -> None:
    """Anything but one line of a known kind of key is Invalid, is not repeated in the error, and is not kept."""
    with pytest.raises(Invalid) as refusal:
        keypairs.create(tx, "alice", "k", key)
    assert refusal.value.code == "keypair.bad_key"
    assert "PRIVATE" not in refusal.value.message
    assert keypairs.list(tx, "alice", limit=10) == []


BODY = "".join(CERTIFICATE.splitlines()[1:-1])


@pytest.mark.parametrize(
    "body", ["", " ", "AAAA", "!!!!", BODY[:-8], base64.b64encode(base64.b64decode(BODY) + b"more").decode()]
)
def test_what_is_no_certificate_is_refused(body: str) -> None:
    """A PEM text whose content is empty, cut, prolonged or something else is Invalid."""
    with pytest.raises(Invalid):
        keypairs.fingerprint(f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n", "x509")
    with pytest.raises(Invalid):
        keypairs.fingerprint(ED25519, "x509")


@given(st.sampled_from(["", "ssh-rsa ", "ssh-ed25519 AAAA", "-----BEGIN CERTIFICATE-----"]), st.text(), st.booleans())
def test_no_text_breaks_the_parser(start: str, rest: str, certificate: bool) -> None:
    """Whatever is sent as a key is taken or refused as Invalid; nothing else ever comes out."""
    with suppress(Invalid):
        made = keypairs.fingerprint(start + rest, "x509" if certificate else "ssh")
        assert made.count(":") == (19 if certificate else 15)


@given(st.binary())
def test_no_binary_breaks_the_parser(blob: bytes) -> None:
    """The same for the key within the base64."""
    encoded = base64.b64encode(blob).decode() or "="
    with pytest.raises(Invalid):
        keypairs.fingerprint(f"ssh-rsa {encoded}", "ssh")
