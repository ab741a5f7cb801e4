"""The door: whatever a client sends, it gets the API's own error, and never a 500."""

import asyncio
import json
import string
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message

from cellway.db.api_tables import instance_mappings
from cellway.db.engines import API
from cellway.http.app import ROUTES, Services, build
from cellway.http.microversions import LATEST
from cellway.http.policy import Policy
from cellway.testing import QUICK, TINY_IMAGE, Client, Deployment

pytestmark = pytest.mark.anyio

RANDOM = "5b0d9e0e-6a7c-4c0e-9d8e-3a8f5a2f9b11"
COUNT = sa.select(sa.func.count()).select_from(instance_mappings)
GOOD = {"name": "one", "flavorRef": "m1.tiny", "imageRef": TINY_IMAGE, "networks": "none"}
NAMES = {
    400: "badRequest", 403: "forbidden", 404: "itemNotFound", 405: "badMethod", 406: "notAcceptable",
    408: "requestTimeout", 409: "conflictingRequest", 413: "overLimit", 415: "badMediaType", 501: "notImplemented",
    503: "serviceUnavailable",
}  # fmt: skip


class Seen(NamedTuple):
    """An answer. `text` is what its fault says."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return str(msgspec.json.decode(self.body)[NAMES[self.status]]["message"])


async def ask(
    app: ASGIApp,
    method: str,
    path: str,
    *,
    query: bytes = b"",
    headers: Mapping[str, str | None] | None = None,
    messages: Iterable[Message] = (),
) -> Seen:
    """Send one request as a server hands it over: the path is decoded, and the client sends no more than `messages`."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(errors="replace"), "root_path": "", "query_string": query,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8774),
        "headers": [
            (name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items() if value
        ],
    }  # fmt: skip
    queue = list(messages)
    sent: list[Message] = []

    async def receive() -> Message:
        if not queue:
            await asyncio.Event().wait()
        return queue.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    shown = {key.decode("latin-1"): value.decode("latin-1") for key, value in sent[0]["headers"]}
    for name, value in shown.items():
        assert not set("\r\n\x00") & set(name + value)
    seen = Seen(sent[0]["status"], shown, sent[1].get("body", b""))
    check(seen)
    return seen


def check(seen: Seen) -> None:
    """Every answer has its request id, and every refusal is a fault document with its own status in it."""
    assert seen.status < 500 or seen.status in (501, 503), seen
    assert seen.headers["x-openstack-request-id"].startswith("req-")
    if seen.status >= 400 and seen.status != 401:
        fault = msgspec.json.decode(seen.body)
        assert fault == {NAMES[seen.status]: {"code": seen.status, "message": fault[NAMES[seen.status]]["message"]}}


def one(body: bytes) -> list[Message]:
    """Return a body that arrives in one piece."""
    return [{"type": "http.request", "body": body, "more_body": False}]


async def post(client: Client, path: str, body: bytes, headers: Mapping[str, str | None] | None = None) -> Seen:
    """Send a body to the Compute API."""
    own = {"content-type": "application/json", "content-length": str(len(body)), **client.headers, **(headers or {})}
    return await ask(client.app, "POST", client.base + path, headers=own, messages=one(body))


async def get(client: Client, path: str, query: bytes = b"", headers: Mapping[str, str] | None = None) -> Seen:
    """Read from the Compute API."""
    own = {**client.headers, **(headers or {})}
    return await ask(client.app, "GET", client.base + path, query=query, headers=own)


@pytest.fixture(scope="module")
async def server(shared: Deployment, anyio_backend: str) -> str:
    """A running server of the member's."""
    made = await shared.boot("hostile")
    await shared.until_status(made, "ACTIVE")
    return made


# ---- bodies ----------------------------------------------------------------------------------------------------

MALFORMED = {
    "nothing": b"",
    "half": b'{"server": {"name": "o',
    "not JSON": b"server=one",
    "two documents": b"{}{}",
    "trailing comma": b'{"server": {},}',
    "single quotes": b"{'server': {}}",
    "invalid UTF-8": b'{"server": {"name": "\xff\xfe"}}',
    "overlong UTF-8": b'{"server": {"name": "\xc0\x80"}}',
    "encoded surrogate": b'{"server": {"name": "\xed\xa0\x80"}}',
    "lone surrogate": b'{"server": {"name": "\\ud800"}}',
    "lone surrogate as a key": b'{"\\udfff": 1}',
    "raw NUL": b'{"server": {"name": "a\x00b"}}',
    "NUL for a document": b"\x00",
    "NaN": b'{"server": {"min_count": NaN}}',
    "Infinity": b'{"server": {"min_count": -Infinity}}',
    "byte order mark": b'\xef\xbb\xbf{"server": {}}',
    "10^5 arrays": b"[" * 100_000,
    "10^5 closed arrays": b"[" * 100_000 + b"]" * 100_000,
    "10^4 objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "deep where anything goes": b'{"server": {"networks": [{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}]}}",
    "array": b"[]",
    "null": b"null",
    "number": b"1e999",
    "string": b'"server"',
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
async def test_a_malformed_body_is_a_400(shared: Deployment, server: str, body: bytes) -> None:
    """What is not the JSON that a call wants is refused, whichever call it is sent to."""
    for path in ("/servers", f"/servers/{server}/action", f"/servers/{server}/metadata", "/flavors", "/os-keypairs"):
        assert (await post(shared.admin, path, body)).status == 400


SERVERS = {
    "no name": {"name": None},
    "empty name": {"name": ""},
    "256 characters": {"name": "n" * 256},
    "blank at the start": {"name": " one"},
    "blank at the end": {"name": "one "},
    "newline at the end": {"name": "one\n"},
    "NUL in the name": {"name": "o\x00ne"},
    "control character": {"name": "o\x1bne"},
    "number for a name": {"name": 1},
    "unknown key": {"nmae": "one"},
    "unknown flavor": {"flavorRef": "no-such"},
    "empty flavor": {"flavorRef": ""},
    "list of flavors": {"flavorRef": ["m1.tiny"]},
    "huge flavor number": {"flavorRef": 10**400},
    "unknown image": {"imageRef": RANDOM},
    "image that is no uuid": {"imageRef": "cirros"},
    "no image": {"imageRef": ""},
    "unknown zone": {"availability_zone": "nowhere"},
    "empty zone": {"availability_zone": ""},
    "zone of four parts": {"availability_zone": "nova:a:b:c"},
    "unknown key pair": {"key_name": "no-such"},
    "networks at all": {"networks": [{"uuid": RANDOM}]},
    "networks of a word": {"networks": "some"},
    "no networks": {"networks": None},
    "volume": {"block_device_mapping_v2": [{"source_type": "volume", "destination_type": "volume", "uuid": RANDOM}]},
    "two images": {"block_device_mapping_v2": [{"source_type": "image", "destination_type": "local", "uuid": RANDOM}]},
    "files": {"personality": [{"path": "/etc/motd", "contents": "aGk="}]},
    "none": {"min_count": 0},
    "negative count": {"max_count": -1},
    "fraction of a server": {"min_count": 1.5},
    "huge count": {"max_count": 10**30},
    "too many": {"max_count": 101},
    "least above most": {"min_count": 3, "max_count": 2},
    "word for a count": {"min_count": "many"},
    "names too long with their numbers": {"name": "n" * 255, "max_count": 2},
    "long metadata key": {"metadata": {"k" * 256: "v"}},
    "empty metadata key": {"metadata": {"": "v"}},
    "metadata key that no address names": {"metadata": {"a/b": "v"}},
    "long metadata value": {"metadata": {"k": "v" * 256}},
    "NUL in metadata": {"metadata": {"k": "\x00"}},
    "metadata of numbers": {"metadata": {"k": 1}},
    "metadata that is a list": {"metadata": []},
    "user data that is no base 64": {"user_data": "%%%"},
    "too much user data": {"user_data": "A" * 65536},
    "config drive of a word": {"config_drive": "perhaps"},
    "unknown disk config": {"OS-DCF:diskConfig": "auto"},
    "IPv4 address": {"accessIPv4": "300.1.1.1"},
    "IPv6 for IPv4": {"accessIPv4": "::1"},
    "IPv6 address with a zone": {"accessIPv6": "fe80::1%" + "e" * 100},
    "long description": {"description": "d" * 256},
    "long tag": {"tags": ["t" * 61]},
    "empty tag": {"tags": [""]},
    "tag with a comma": {"tags": ["a,b"]},
    "51 tags": {"tags": [str(number) for number in range(51)]},
}


@pytest.mark.parametrize("changes", SERVERS.values(), ids=SERVERS)
async def test_a_server_that_cannot_be_is_a_400(shared: Deployment, changes: dict[str, Any]) -> None:
    """A create request with one thing wrong is refused with a sentence, and makes nothing."""
    before = await shared.in_api(lambda tx: tx.execute(COUNT).scalar_one())
    seen = await post(shared.admin, "/servers", json.dumps({"server": GOOD | changes}).encode())
    assert seen.status == 400
    assert seen.text
    assert await shared.in_api(lambda tx: tx.execute(COUNT).scalar_one()) == before


async def test_networks_are_required_from_2_37(shared: Deployment) -> None:
    """Leaving networks out is refused at 2.37, and the words are refused before it."""
    without = {key: value for key, value in GOOD.items() if key != "networks"}
    assert (await shared.member.at("2.37").post("/servers", {"server": without})).status == 400
    assert (await shared.member.at("2.36").post("/servers", {"server": GOOD})).status == 400


async def test_the_last_of_two_equal_keys_counts(shared: Deployment, server: str) -> None:
    """A key that stands twice in an object means what it says last, as everywhere in Python."""
    seen = await post(shared.member, f"/servers/{server}/metadata", b'{"metadata": {"twice": "a", "twice": "b"}}')
    assert msgspec.json.decode(seen.body)["metadata"]["twice"] == "b"


ACTIONS = {
    "no action": {},
    "two actions": {"os-start": None, "os-stop": None},
    "unknown action": {"explode": None},
    "argument where none is": {"os-stop": {"now": True}},
    "no argument": {"reboot": None},
    "unknown type": {"reboot": {"type": "MEDIUM"}},
    "unknown key": {"reboot": {"type": "SOFT", "now": True}},
    "unknown state": {"os-resetState": {"state": "sleepy"}},
    "NUL": {"reboot": {"type": "\x00"}},
}


@pytest.mark.parametrize("body", ACTIONS.values(), ids=ACTIONS)
async def test_an_action_that_cannot_be_is_a_400(shared: Deployment, server: str, body: dict[str, Any]) -> None:
    """An action's body names one action and its argument."""
    assert (await post(shared.admin, f"/servers/{server}/action", msgspec.json.encode(body))).status == 400


# ---- addresses and queries -------------------------------------------------------------------------------------

QUERIES = [
    b"limit=-1", b"limit=x", b"limit=1.5", b"limit=99999999999999999999", b"limit=%EF%BC%91", b"limit=",
    b"marker=nobody", b"marker=" + RANDOM.encode(), b"marker=", b"marker=%00", b"name=%00",
    b"sort_key=flavour", b"sort_dir=up", b"changes-since=yesterday", b"changes-since=0000-00-00", b"all_tenants=maybe",
    b"status=DEADISH", b"name=" + b"n" * 256,
]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.decode()[:40])
async def test_a_bad_query_of_a_server_list_is_a_400(shared: Deployment, query: bytes) -> None:
    """A parameter that means nothing is refused, in both lists."""
    assert (await get(shared.admin, "/servers", query)).status == 400
    assert (await get(shared.admin, "/servers/detail", query)).status == 400


@pytest.mark.parametrize(
    "query",
    [b"limit=-1", b"marker=nobody", b"sort_key=weight", b"sort_dir=up", b"minRam=-1", b"minDisk=x", b"is_public=9"],
    ids=lambda query: query.decode(),
)
async def test_a_bad_query_of_a_flavor_list_is_a_400(shared: Deployment, query: bytes) -> None:
    """A parameter that means nothing is refused, in both lists."""
    assert (await get(shared.admin, "/flavors", query)).status == 400
    assert (await get(shared.admin, "/flavors/detail", query)).status == 400


@pytest.mark.parametrize("query", [b"limit=-1", b"marker=nobody"], ids=lambda query: query.decode())
async def test_a_bad_query_of_a_keypair_list_is_a_400(shared: Deployment, query: bytes) -> None:
    """Paging by a keypair that is not there is refused."""
    assert (await get(shared.admin, "/os-keypairs", query)).status == 400


async def test_long_and_odd_filters_find_nothing(shared: Deployment, server: str) -> None:
    """A filter of any length and alphabet is a filter."""
    for query in (
        b"name=" + b"_" * 255,
        b"name=" + b".*" * 120 + b"$no",
        b"name=%25%FF(*[",
        b"image=%F0%9F%90%8B",
        b"flavor=" + b"f" * 10_000,
        b"reservation_id='%20OR%201=1",
        b"tags=" + b",".join(str(number).encode() for number in range(5000)),
        b"status=RESCUE",
        b"changes-since=9999-12-31T23:59:59Z",
    ):
        seen = await get(shared.member, "/servers/detail", query)
        assert (seen.status, seen.body) == (200, b'{"servers":[]}'), query


async def test_unknown_parameters_are_ignored(shared: Deployment) -> None:
    """Before 2.75 a parameter that nobody knows changes nothing."""
    assert (await get(shared.member, "/servers", b"colour=blue&colour=red&=&&;")).status == 200


async def test_paths_that_lead_nowhere_are_not_found(shared: Deployment, server: str) -> None:
    """An unknown path, and an id that cannot be one, are 404s; one with a NUL is a 400."""
    for path in (
        "/nothing", "/servers/", "/servers/x", f"/servers/{server}/nothing", f"/servers/{server}/",
        "/servers/../flavors", f"/servers/{server}%", "/servers/%zz", "/servers/\ufffd",
        "/servers/" + "a" * 5000, f"/servers/{server}\n",
        "/flavors/\u2603", "/os-keypairs/\U0001f40b", "", "/..",
    ):  # fmt: skip
        seen = await get(shared.admin, path)
        assert seen.status == (200 if path == "" else 404), path
    for path in ("/servers/\x00", f"/servers/{server}/metadata/\x00", "/\x00"):
        assert (await get(shared.admin, path)).status == 400


async def test_a_wrong_method_is_a_405_that_names_the_right_ones(shared: Deployment, server: str) -> None:
    """A method that a path does not have is refused with those that it has."""
    seen = await ask(shared.port, "PATCH", f"/compute/v2.1/servers/{server}", headers=shared.member.headers)
    assert (seen.status, seen.headers["allow"]) == (405, "DELETE, GET, PUT")
    seen = await ask(shared.port, "DELETE", "/compute/v2.1/servers", headers=shared.member.headers)
    assert (seen.status, seen.headers["allow"]) == (405, "GET, POST")


async def test_the_project_in_the_path_is_the_tokens(shared: Deployment, server: str) -> None:
    """A path may name the token's project, and no other."""
    own = (await shared.member.get(f"/servers/{server}")).json["server"]["tenant_id"]
    assert (await get(shared.member, f"/{own}/servers/{server}")).status == 200
    seen = await get(shared.admin, f"/{own}/servers/{server}")
    assert (seen.status, seen.text.split(":")[0]) == (400, "Malformed request URL")


async def test_identity_headers_of_a_client_mean_nothing(shared: Deployment) -> None:
    """Only the token says who asks, whatever a client claims beside it."""
    claims = {"X-User-Id": "admin", "X-Roles": "admin", "X-Project-Id": RANDOM, "X-Identity-Status": "Confirmed"}
    assert (await get(shared.member, "/os-services", headers=claims)).status == 403
    assert (await ask(shared.port, "GET", "/compute/v2.1/servers", headers={**claims})).status == 401


def _services(shared: Deployment, **limits: Any) -> Services:
    """Return what handlers answer with, under other limits."""
    app = shared.app
    return Services(
        compute=app.open_compute(shared.identity), quotas=app.quotas, projects=shared.identity.store, hosts=app.hosts,
        api=app.databases.on(API), policy=Policy.load(None),
        limits=replace(QUICK, **limits), clock=app.clock, ids=app.ids,
        compute_url="http://127.0.0.1:8774/compute/v2.1", identity_url="http://127.0.0.1:8774/identity",
    )  # fmt: skip


# ---- the connection --------------------------------------------------------------------------------------------


async def test_long_bodies_and_headers_are_refused(shared: Deployment) -> None:
    """A body or headers over the limit are a 413, whether the length is announced, false, or not said."""
    large = b" " * (QUICK.body_bytes + 1)
    assert (await post(shared.member, "/servers", large)).status == 413
    assert (await post(shared.member, "/servers", b"{}", {"content-length": "9" * 400})).status == 413
    assert (await post(shared.member, "/servers", large, {"content-length": "2"})).status == 413
    chunked = {"content-length": None, "transfer-encoding": "chunked"}
    assert (await post(shared.member, "/servers", large, chunked)).status == 413
    assert (await get(shared.member, "/servers", headers={"X-Long": "x" * QUICK.header_bytes})).status == 413
    assert (await get(shared.member, "/servers", b"name=" + b"x" * QUICK.header_bytes)).status == 413


async def test_odd_lengths_are_no_trouble(shared: Deployment) -> None:
    """A content length that is not a number changes nothing: the body is what arrives."""
    for length in ("\xb2", "-1", "1e3", "0x10", " "):
        assert (await post(shared.member, "/servers", b"{}", {"content-length": length})).status == 400


async def test_a_body_of_another_type_is_a_415(shared: Deployment) -> None:
    """Only JSON is taken, in any spelling of its type."""
    for kind in ("text/xml", "application/xml", "multipart/form-data; boundary=x", "json", "application/json-patch"):
        assert (await post(shared.member, "/servers", b"{}", {"content-type": kind})).status == 415
    for good in ("application/json", "Application/JSON; charset=utf-8", None):
        assert (await post(shared.member, "/servers", b"{}", {"content-type": good})).status == 400


async def test_a_body_that_never_arrives_is_a_408(shared: Deployment) -> None:
    """A client that announces a body and does not send it is answered within the limit, and its half is not used."""
    app = build(_services(shared, receive_seconds=0.01), shared.identity.tokens)
    headers = {"content-length": "100", **shared.member.headers}
    for messages in ([], [{"type": "http.request", "body": b'{"server', "more_body": True}]):
        seen = await ask(app, "POST", "/compute/v2.1/servers", headers=headers, messages=messages)
        assert seen.status == 408


async def test_a_client_that_goes_away_leaves_nothing_behind(shared: Deployment) -> None:
    """A body that is cut off is not acted on."""
    body = msgspec.json.encode({"server": GOOD})
    headers = {"content-length": str(len(body)), "content-type": "application/json", **shared.member.headers}
    before = await shared.in_api(lambda tx: tx.execute(COUNT).scalar_one())
    cut: list[Message] = [{"type": "http.request", "body": body[:20], "more_body": True}, {"type": "http.disconnect"}]
    assert (await ask(shared.port, "POST", "/compute/v2.1/servers", headers=headers, messages=cut)).status == 400
    assert await shared.in_api(lambda tx: tx.execute(COUNT).scalar_one()) == before


async def test_tokens_that_are_none_are_a_401_with_the_way_to_get_one(shared: Deployment) -> None:
    """A missing or garbled token is the identity service's 401, on every path, known or not."""
    for token in (None, "x", "\xff", "a" * 5000, "é", "gAAAA" + "=" * 20):
        for path in ("/compute/v2.1/servers", "/compute/v2.1/nothing"):
            seen = await ask(shared.port, "GET", path, headers={"x-auth-token": token})
            assert seen.status == 401
            assert seen.headers["www-authenticate"].startswith("Keystone uri=")
            assert msgspec.json.decode(seen.body)["error"]["code"] == 401


async def test_no_input_becomes_a_header(shared: Deployment, server: str) -> None:
    """A line break in a tag's address stays in the tag: `ask` refuses one in a header."""
    path = f"/compute/v2.1/servers/{server}/tags/a\r\nSet-Cookie: b=c"
    seen = await ask(shared.port, "PUT", path, headers=shared.member.headers)
    assert (seen.status, seen.headers["location"][-28:]) == (201, "/tags/a%0D%0ASet-Cookie%3A%20b%3Dc"[-28:])


# ---- fuzz ------------------------------------------------------------------------------------------------------

WORDS = sorted(
    {"", "-1", "0", "1", "2147483648", RANDOM, "cell1", "cell1-h1", "m1.tiny", "enable", "detail", "..", "%", "true"}
    | set("server name flavorRef imageRef networks metadata meta key tags flavor ram vcpus disk id keypair".split())
    | set("public_key addTenantAccess tenant extra_specs host binary status os-stop reboot type SOFT none auto".split())
    | set("limit marker sort_key sort_dir deleted all_tenants changes-since tags-any not-tags tenant_id".split())
    | set("created_at display_name asc desc ACTIVE 2020-01-01T00:00:00Z reserved with_servers ip ip6 locked".split())
)
_words = st.sampled_from(WORDS) | st.text(max_size=8) | st.text(alphabet=string.printable, max_size=4)
_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=4),
    max_leaves=10,
)


_shaped = st.sampled_from(
    [
        {"server": GOOD},
        {"metadata": {"a": "b"}},
        {"meta": {"key": "b"}},
        {"tags": ["a"]},
        {"reboot": {"type": "SOFT"}},
        {"flavor": {"name": "fuzz", "ram": 1, "vcpus": 1, "disk": 1}},
        {"extra_specs": {"a": "b"}},
        {"addTenantAccess": {"tenant": "a"}},
        {"keypair": {"name": "fuzz", "public_key": "ssh-rsa AAAA"}},
        {"host": "cell9-h1", "binary": "nova-compute"},
    ]
)


@st.composite
def _mutants(draw: st.DrawFn) -> Any:
    """A body of the right shape with one place of it changed."""
    body = msgspec.json.decode(msgspec.json.encode(draw(_shaped)))
    inner = body
    while isinstance(inner, dict) and inner:
        key = draw(st.sampled_from(sorted(inner)))
        if not isinstance(inner[key], dict) or draw(st.booleans()):
            inner[draw(st.just(key) | _words)] = draw(_values)
            break
        inner = inner[key]
    return body


_bodies = st.just(b"") | st.binary(max_size=24) | (_values | _mutants()).map(lambda body: json.dumps(body).encode())
_queries = st.lists(st.tuples(_words, _words).map("=".join), max_size=3).map("&".join)


class Request(NamedTuple):
    """One request. `{it}` in the path is something that exists."""

    method: str
    path: str
    query: str
    body: bytes
    minor: int


@st.composite
def _requests(draw: st.DrawFn) -> Request:
    route = draw(st.sampled_from(ROUTES))
    spared = route.method == "DELETE" or (route.method == "PUT" and route.path.startswith("/os-services"))
    # The other tests need the server, the flavor and the hosts.
    places = st.just(RANDOM) if spared else st.just("{it}") | _words
    parts = (draw(places).replace("/", "-") if part.startswith("{") else part for part in route.path.split("/"))
    minors = st.sampled_from([1, 2, 10, 26, 37, 52, LATEST])
    return Request(route.method, "/".join(parts), draw(_queries), draw(_bodies), draw(minors))


@settings(max_examples=150)
@given(request=_requests())
async def test_no_request_whatever_is_a_500(shared: Deployment, server: str, request: Request) -> None:
    """Random paths, queries and bodies on every route get an answer below 500, a 501 or a 503, and a fault body."""
    it = server if request.path.startswith("/servers/") else "m1.tiny"
    path = "/compute/v2.1" + request.path.replace("{it}", it)
    for client in (shared.member, shared.admin):
        headers = {"content-type": "application/json", "content-length": str(len(request.body)), **client.headers}
        headers["OpenStack-API-Version"] = f"compute 2.{request.minor}"
        query = request.query.encode()
        await ask(client.app, request.method, path, query=query, headers=headers, messages=one(request.body))
