"""The built-in identity and image list over HTTP: the shapes that clients need, who sees what, and the door."""

import asyncio
import hashlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.types import ASGIApp, Message

from cellway.config import Limits
from cellway.context import SystemClock
from cellway.identity import BuiltinIdentity, build
from cellway.identity.images import TINY
from cellway.ids import RandomIds
from cellway.outside import ImageCatalog

PUBLIC = "http://cellway.example:8774"
TOKENS = "/identity/v3/auth/tokens"

pytestmark = pytest.mark.anyio


@dataclass
class Answer:
    """What the application sent."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> Any:
        return msgspec.json.decode(self.content)


async def ask(
    app: ASGIApp,
    method: str,
    path: str,
    *,
    token: str | None = None,
    body: object = None,
    raw: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    messages: list[Message] | None = None,
) -> Answer:
    """Send one request to `app` in this process; the server's own work (percent-decoding) is done here."""
    sent = {"host": "attacker.example", **(headers or {})}
    if token is not None:
        sent["x-auth-token"] = token
    content = raw if raw is not None else msgspec.json.encode(body)
    queue = messages if messages is not None else [{"type": "http.request", "body": content, "more_body": False}]
    address, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": address.replace("%00", "\x00"),
        "raw_path": address.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in sent.items()],
        "server": ("127.0.0.1", 8774),
        "client": ("127.0.0.1", 50000),
    }
    received: list[Message] = []

    async def receive() -> Message:
        if not queue:
            await asyncio.Event().wait()
        return queue.pop(0)

    async def send(message: Message) -> None:
        received.append(message)

    await app(scope, receive, send)
    start = received[0]
    answered = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], answered, b"".join(message.get("body", b"") for message in received[1:]))


def build_at(folder: Path, limits: Limits) -> BuiltinIdentity:
    """Build the shell over the users' file in `folder`."""
    return build(
        folder / "users.json",
        identity_url=f"{PUBLIC}/identity",
        compute_url=f"{PUBLIC}/compute/v2.1",
        image_url=f"{PUBLIC}/image",
        limits=limits,
        clock=SystemClock(),
        ids=RandomIds(),
    )


@pytest.fixture
def limits() -> Limits:
    """The limits as they are by default."""
    return Limits()


@pytest.fixture(scope="module")
def users_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A users' file with passwords: hashing them takes a while."""
    folder = tmp_path_factory.mktemp("users")
    build_at(folder, Limits()).store.set_passwords({"admin": "admin's", "demo": "demo's"})
    return folder / "users.json"


@pytest.fixture
def identity(tmp_path: Path, limits: Limits, users_file: Path) -> BuiltinIdentity:
    """The shell, with an admin and a member whose passwords are their names and 's."""
    shutil.copy(users_file, tmp_path)
    return build_at(tmp_path, limits)


@pytest.fixture
def app(identity: BuiltinIdentity) -> ASGIApp:
    """The application that `ask` takes."""
    return identity.app


def password(name: str, secret: str | None = None, scope: object = None) -> dict[str, Any]:
    """Return the body with which the user of this name signs in."""
    user = {"name": name, "domain": {"name": "Default"}, "password": secret or f"{name}'s"}
    auth: dict[str, Any] = {"identity": {"methods": ["password"], "password": {"user": user}}}
    if scope is not None:
        auth["scope"] = scope
    return {"auth": auth}


async def sign_in(app: ASGIApp, name: str) -> str:
    """Return a new token of the user of this name."""
    answer = await ask(app, "POST", TOKENS, body=password(name))
    assert answer.status == 201
    return answer.headers["x-subject-token"]


async def test_discovery_needs_no_token_and_shows_the_configured_address(app: ASGIApp) -> None:
    """Version documents answer anybody, with links to the public address whatever the Host header says."""
    for path in ("/identity", "/identity/"):
        answer = await ask(app, "GET", path)
        assert answer.status == 300
        assert answer.body["versions"]["values"][0]["links"][0]["href"] == f"{PUBLIC}/identity/v3/"
    for path in ("/identity/v3", "/identity/v3/"):
        answer = await ask(app, "GET", path)
        assert answer.status == 200
        assert answer.body["version"]["id"] == "v3.14"
    for path in ("/image", "/image/", "/image/versions"):
        answer = await ask(app, "GET", path)
        assert answer.status == 300
        assert answer.body["versions"][0]["links"][0]["href"] == f"{PUBLIC}/image/v2/"
        assert "attacker" not in str(answer)


async def test_a_password_gives_a_token_with_catalog(app: ASGIApp, identity: BuiltinIdentity) -> None:
    """Signing in answers 201 with the token in its header only, and a catalog of the three services."""
    answer = await ask(app, "POST", TOKENS, body=password("demo"))
    assert answer.status == 201
    subject = answer.headers["x-subject-token"]
    assert subject.encode() not in answer.content
    token = answer.body["token"]
    assert token["methods"] == ["password"]
    assert token["user"]["name"] == token["project"]["name"] == "demo"
    assert token["user"]["domain"] == token["project"]["domain"] == {"id": "default", "name": "Default"}
    assert [role["name"] for role in token["roles"]] == ["member", "reader"]
    assert token["issued_at"] < token["expires_at"]
    urls = {each["type"]: {e["url"] for e in each["endpoints"]} for each in token["catalog"]}
    assert urls == {
        "identity": {f"{PUBLIC}/identity"},
        "compute": {f"{PUBLIC}/compute/v2.1"},
        "image": {f"{PUBLIC}/image"},
    }
    verified = await identity.tokens.verify(subject)
    assert verified is not None
    assert verified.project_id == token["project"]["id"]


async def test_every_way_to_name_a_user_and_scope_is_understood(app: ASGIApp, identity: BuiltinIdentity) -> None:
    """User and project may be given by id or by name and domain; no scope means the user's own project."""
    user, project = identity.store.find_user_named("demo"), identity.store.find_project_named("demo")
    assert user is not None
    assert project is not None
    by_id = {
        "auth": {"identity": {"methods": ["password"], "password": {"user": {"id": user.id, "password": "demo's"}}}}
    }
    bodies = [
        by_id,
        password("demo", scope={"project": {"id": project.id}}),
        password("demo", scope={"project": {"name": "demo", "domain": {"id": "default"}}}),
        password("demo", scope={"project": {"name": "demo", "domain": {"name": "Default"}}}),
        password("demo", scope="unscoped"),
    ]
    for body in bodies:
        answer = await ask(app, "POST", TOKENS, body=body)
        assert answer.status == 201
        assert answer.body["token"]["project"]["id"] == project.id


async def test_a_wrong_sign_in_tells_nothing(app: ASGIApp, identity: BuiltinIdentity) -> None:
    """A wrong password, an unknown user, another's project, a domain and a system scope get the same 401."""
    admins = identity.store.find_project_named("admin")
    assert admins is not None
    foreign = password("demo")
    foreign["auth"]["identity"]["password"]["user"]["domain"] = {"name": "Other"}
    refused = [
        password("demo", "wrong"),
        password("nobody"),
        password("demo\u00e9"),
        foreign,
        password("demo", scope={"project": {"id": admins.id}}),
        password("demo", scope={"project": {"name": "admin", "domain": {"id": "default"}}}),
        password("demo", scope={"project": {"name": "none", "domain": {"id": "default"}}}),
        password("demo", scope={"project": {"name": "demo", "domain": {"id": "other"}}}),
        password("demo", scope={"domain": {"id": "default"}}),
        password("demo", scope={"system": {"all": True}}),
        {"auth": {"identity": {"methods": ["token"], "token": {"id": "notused"}}}},
    ]
    contents = set()
    for body in refused:
        answer = await ask(app, "POST", TOKENS, body=body)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == f'Keystone uri="{PUBLIC}/identity"'
        assert "x-subject-token" not in answer.headers
        contents.add(answer.content)
    assert len(contents) == 1


async def test_an_unknown_user_costs_a_password_check(app: ASGIApp) -> None:
    """An unknown user is refused after as much work as a wrong password, so time does not tell them apart."""

    async def cost(body: object) -> float:
        costs = []
        for _ in range(5):
            before = time.process_time()
            assert (await ask(app, "POST", TOKENS, body=body)).status == 401
            costs.append(time.process_time() - before)
        return min(costs)

    unchecked = await cost({"auth": {"identity": {"methods": ["token"], "token": {"id": "x"}}}})
    assert await cost(password("demo", "wrong")) > 10 * unchecked
    assert await cost(password("nobody", "wrong")) > 10 * unchecked


async def test_a_token_gives_a_token_that_expires_with_it(app: ASGIApp) -> None:
    """The method `token` keeps the expiry of the first token and says so in its methods."""
    first = await ask(app, "POST", TOKENS, body=password("demo"))
    token = first.headers["x-subject-token"]
    body = {"auth": {"identity": {"methods": ["token"], "token": {"id": token}}}}
    second = await ask(app, "POST", TOKENS, body=body)
    assert second.status == 201
    assert second.headers["x-subject-token"] != token
    assert second.body["token"]["expires_at"] == first.body["token"]["expires_at"]
    assert second.body["token"]["methods"] == ["password", "token"]
    assert second.body["token"]["audit_ids"][1] == first.body["token"]["audit_ids"][0]


async def test_tokens_are_validated_and_revoked(app: ASGIApp) -> None:
    """An admin may ask about any token, a member about its own; a revoked token is refused at once."""
    admin, demo = await sign_in(app, "admin"), await sign_in(app, "demo")
    for caller in (admin, demo):
        for method in ("GET", "HEAD"):
            answer = await ask(app, method, TOKENS, token=caller, headers={"x-subject-token": demo})
            assert answer.status == 200
    assert (await ask(app, "GET", TOKENS, token=demo, headers={"x-subject-token": demo})).body["token"]["catalog"]
    bare = await ask(app, "GET", f"{TOKENS}?nocatalog", token=demo, headers={"x-subject-token": demo})
    assert "catalog" not in bare.body["token"]
    assert bare.body["token"]["user"]["name"] == "demo"
    for method in ("GET", "DELETE"):
        assert (await ask(app, method, TOKENS, token=demo)).status == 400
        assert (await ask(app, method, TOKENS, headers={"x-subject-token": demo})).status == 401
        assert (await ask(app, method, TOKENS, token=demo, headers={"x-subject-token": admin})).status == 403
        assert (await ask(app, method, TOKENS, token=demo, headers={"x-subject-token": "x"})).status == 404
    assert (await ask(app, "DELETE", TOKENS, token=demo, headers={"x-subject-token": demo})).status == 204
    assert (await ask(app, "GET", "/identity/v3/projects", token=demo)).status == 401
    assert (await ask(app, "GET", TOKENS, token=admin, headers={"x-subject-token": demo})).status == 404
    assert (await ask(app, "GET", "/identity/v3/projects", token=admin)).status == 200


async def names(app: ASGIApp, path: str, token: str) -> list[str]:
    """Return the names in a list."""
    answer = await ask(app, "GET", path, token=token)
    assert answer.status == 200
    (collection,) = answer.body.keys() - {"links"}
    return [item["name"] for item in answer.body[collection]]


async def test_an_admin_sees_all_and_others_only_their_own(app: ASGIApp, identity: BuiltinIdentity) -> None:
    """Projects and users of others answer a member and a reader exactly as ones that do not exist."""
    identity.store.create_user("rita", project="demo", role="reader", password="rita's")
    admin = await sign_in(app, "admin")
    assert await names(app, "/identity/v3/projects", admin) == ["admin", "demo"]
    assert await names(app, "/identity/v3/users", admin) == ["admin", "demo", "rita"]
    admin_user, admin_project = identity.store.list_users()[0], identity.store.list_projects()[0]
    for name in ("demo", "rita"):
        token, user = await sign_in(app, name), identity.store.find_user_named(name)
        assert user is not None
        assert await names(app, "/identity/v3/projects", token) == ["demo"]
        assert await names(app, "/identity/v3/auth/projects", token) == ["demo"]
        assert await names(app, "/identity/v3/projects?name=admin", token) == []
        assert await names(app, "/identity/v3/users", token) == [name]
        assert await names(app, f"/identity/v3/users/{user.id}/projects", token) == ["demo"]
        assert (await ask(app, "GET", f"/identity/v3/users/{user.id}", token=token)).status == 200
        mine = await ask(app, "GET", f"/identity/v3/projects/{user.default_project_id}", token=token)
        assert mine.body["project"]["name"] == "demo"
        for theirs, random in (
            (f"projects/{admin_project.id}", "projects/" + "0" * 32),
            (f"users/{admin_user.id}", "users/" + "0" * 32),
            (f"users/{admin_user.id}/projects", "users/" + "0" * 32 + "/projects"),
        ):
            hidden = await ask(app, "GET", f"/identity/v3/{theirs}", token=token)
            missing = await ask(app, "GET", f"/identity/v3/{random}", token=token)
            assert hidden.status == missing.status == 404
            assert hidden.content == missing.content


async def test_look_up_by_name_is_a_404_and_then_a_list(app: ASGIApp, identity: BuiltinIdentity) -> None:
    """What clients do with a name: the name as an id is a 404, and the list filters by it."""
    admin = await sign_in(app, "admin")
    for collection, name in (("projects", "demo"), ("users", "demo"), ("domains", "Default"), ("roles", "member")):
        path = f"/identity/v3/{collection}"
        assert (await ask(app, "GET", f"{path}/{name}", token=admin)).status == 404
        answer = await ask(app, "GET", f"{path}?name={name}&unknown=1", token=admin)
        (item,) = answer.body[collection]
        assert item["name"] == name
        assert answer.body["links"] == {"next": None, "previous": None, "self": f"{PUBLIC}{path}"}
        shown = await ask(app, "GET", f"{path}/{item['id']}", token=admin)
        assert shown.body[collection[:-1]] == item
    assert await names(app, "/identity/v3/projects?enabled=true&domain_id=default", admin) == ["admin", "demo"]
    assert await names(app, "/identity/v3/projects?is_domain=true", admin) == []
    catalog = await ask(app, "GET", "/identity/v3/auth/catalog", token=admin)
    assert [service["type"] for service in catalog.body["catalog"]] == ["identity", "compute", "image"]


async def test_images_are_listed_filtered_and_shown(app: ASGIApp) -> None:
    """The built-in image is found by id, by name and by the filters that clients send."""
    token = await sign_in(app, "demo")
    shown = await ask(app, "GET", f"/image/v2/images/{TINY.id}", token=token)
    assert shown.status == 200
    assert shown.body["name"] == "tiny"
    assert (shown.body["min_disk"], shown.body["min_ram"], shown.body["status"]) == (0, 0, "active")
    assert (await ask(app, "GET", "/image/v2/images/tiny", token=token)).status == 404

    async def count(query: str) -> int:
        answer = await ask(app, "GET", f"/image/v2/images{query}", token=token)
        assert answer.status == 200
        assert "next" not in answer.body
        return len(answer.body["images"])

    found = ["", "?name=tiny", f"?id=in%3A{TINY.id},other", "?status=active", "?visibility=public", "?visibility=all"]
    found += ["?limit=1", "?sort=name:asc,id", "?sort_key=size&sort_dir=desc", "?protected=true", "?size_min=1"]
    for query in found:
        assert await count(query) == 1, query
    none = ["?name=big", "?id=in:other", "?status=queued", "?visibility=private", "?limit=0", "?size_max=1"]
    none += [f"?marker={TINY.id}", "?tag=gpu", "?os_distro=debian", "?os_hidden=true"]
    for query in none:
        assert await count(query) == 0, query
    for query in ("?limit=-1", "?limit=x", "?limit=" + "9" * 99, "?marker=x", "?sort=passwords", "?sort=name:up"):
        assert (await ask(app, "GET", f"/image/v2/images{query}", token=token)).status == 400, query


async def test_image_pages_meet_without_gap_or_overlap(tmp_path: Path) -> None:
    """Following `next` visits every image once, and the filters stay."""
    pages = build_at(tmp_path, Limits())
    images = pages.images
    images._images.update({str(number): replace(TINY, id=str(number), name=f"image {number}") for number in range(4)})
    demo, project = pages.store.find_user_named("demo"), pages.store.find_project_named("demo")
    assert demo is not None
    assert project is not None
    token, _ = pages.tokens.issue(demo, project)
    path, seen = "/v2/images?status=active&limit=2&sort=id:asc", []
    while path:
        body = (await ask(pages.app, "GET", f"/image{path}", token=token)).body
        seen += [image["id"] for image in body["images"]]
        path = body.get("next", "")
        assert not path or "status=active" in path
    assert seen == sorted(image.id for image in images.list())
    assert len(seen) == 5


async def test_compute_can_ask_for_an_image(identity: BuiltinIdentity) -> None:
    """The catalogue finds the built-in image by id and nothing else."""
    catalog: ImageCatalog = identity.images
    image = await catalog.find(TINY.id)
    assert image is not None
    assert (image.name, image.min_ram_mb, image.min_disk_gb) == ("tiny", 0, 0)
    assert await catalog.find("tiny") is None


def test_the_checksums_are_those_of_the_image() -> None:
    """The built-in image is a mebibyte of zeros, and its sums say so."""
    zeros = bytes(TINY.size_bytes)
    assert hashlib.md5(zeros, usedforsecurity=False).hexdigest() == TINY.md5
    assert hashlib.sha512(zeros).hexdigest() == TINY.sha512


async def test_whatever_needs_a_token_refuses_without_one(app: ASGIApp) -> None:
    """No token, an invented one and headers that claim an identity all get Keystone's 401."""
    ids = "0" * 32
    paths = [
        f"/identity/v3/{name}" for name in ("projects", "users", "domains", "roles", "auth/catalog", "auth/projects")
    ]
    paths += [f"/identity/v3/{name}/{ids}" for name in ("projects", "users", "domains", "roles")]
    paths += [f"/identity/v3/users/{ids}/projects", TOKENS, "/image/v2/images", f"/image/v2/images/{TINY.id}"]
    for path in paths:
        for token in (None, "", "notused", "\xff"):
            answer = await ask(app, "GET", path, token=token, headers={"x-user-id": ids, "x-roles": "admin"})
            assert answer.status == 401, path
            assert answer.body["error"]["title"] == "Unauthorized"
            assert answer.headers["www-authenticate"].startswith("Keystone uri=")


async def test_unknown_paths_and_methods_answer_in_the_same_shape(app: ASGIApp) -> None:
    """The router's own refusals are JSON errors with a request id, and never a redirect."""
    for method, path, status in (
        ("GET", "/identity/v3/nothing", 404),
        ("GET", "/identity/v3/projects/", 404),
        ("GET", "/image/v1", 404),
        ("GET", "/elsewhere", 404),
        ("PATCH", TOKENS, 405),
        ("POST", "/identity/v3/users", 405),
        ("DELETE", f"/image/v2/images/{TINY.id}", 405),
    ):
        answer = await ask(app, method, path)
        assert answer.status == answer.body["error"]["code"] == status
        assert answer.headers["x-openstack-request-id"].startswith("req-")
    assert set((await ask(app, "PATCH", TOKENS)).headers["allow"].split(", ")) == {"GET", "HEAD", "POST", "DELETE"}


def user_with(**fields: object) -> bytes:
    """Return a sign-in whose user has these fields."""
    user = {"name": "demo", "domain": {"id": "default"}, "password": "demo's", **fields}
    return msgspec.json.encode({"auth": {"identity": {"methods": ["password"], "password": {"user": user}}}})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"auth": null}',
        b'{"auth": {"identity": {}}}',
        b'{"auth": {"identity": {"methods": "password"}}}',
        b'{"auth": {"identity": {"methods": ["password"]}}}',
        b'{"auth": {"identity": {"methods": ["token"]}}}',
        b'{"auth": {"identity": {"methods": [], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}}",
        b"[" * 200_000,
        b'{"auth": "\xff\xfe"}',
        b'{"auth": {"identity": {"methods": ["\xc3\x28"]}}}',
        b'{"auth": {"identity": {"methods": ["password"]}}',
        user_with(name="de\x00mo"),
        user_with(password="de\x00mo"),
        user_with(password="p" * 5000),
        user_with(name="n" * 256),
        user_with(name=7),
        user_with(name=None),
        user_with(domain=None),
        user_with(extra=1),
        user_with(**{"k" * 100_000: 1}),
        user_with().replace(b"demo's", rb"\ud800"),
        msgspec.json.encode(password("demo", scope={"project": {"name": "demo"}})),
        msgspec.json.encode(password("demo", scope={"project": {}})),
        msgspec.json.encode(password("demo", scope="everything")),
        msgspec.json.encode(password("demo", scope={"unknown": {}})),
    ],
)
async def test_a_malformed_sign_in_is_a_400(app: ASGIApp, raw: bytes) -> None:
    """Hostile JSON gets a short error in Keystone's shape, and never a 500."""
    answer = await ask(app, "POST", TOKENS, raw=raw)
    assert answer.status == answer.body["error"]["code"] == 400
    assert len(answer.content) < 1000


@pytest.mark.parametrize("methods", [[], ["password", "totp"], ["application_credential"], ["external"], [""]])
async def test_an_unsupported_method_is_a_401(app: ASGIApp, methods: list[str]) -> None:
    """Methods that are not served are refused as Keystone refuses them, whatever fields they bring."""
    body = {"auth": {"identity": {"methods": methods, "application_credential": {"id": "x", "secret": "y"}}}}
    answer = await ask(app, "POST", TOKENS, body=body)
    assert answer.status == 401
    assert "unsupported method" in answer.body["error"]["message"]


async def test_null_characters_are_refused_everywhere(app: ASGIApp) -> None:
    """A null character in a path or a query is a 400."""
    token = await sign_in(app, "admin")
    for path in ("/identity/v3/projects/%00", "/identity/v3/projects?name=%00", "/image/v2/images?id=in:%00"):
        assert (await ask(app, "GET", path, token=token)).status == 400


async def test_what_is_received_is_bounded(app: ASGIApp, limits: Limits) -> None:
    """A body, also one sent in pieces without end, headers and a query over their limits are cut off."""
    assert (await ask(app, "POST", TOKENS, raw=b" " * (limits.body_bytes + 1))).status == 413
    piece: Message = {"type": "http.request", "body": b" " * 65536, "more_body": True}
    pieces = [piece] * 100
    assert (await ask(app, "POST", TOKENS, messages=pieces)).status == 413
    assert len(pieces) > 90
    assert (await ask(app, "GET", "/identity", headers={"x": "h" * limits.header_bytes})).status == 431
    assert (await ask(app, "GET", "/identity?" + "q" * limits.header_bytes)).status == 431
    assert (await ask(app, "GET", "/identity/v3/projects", token="t" * 20_000)).status == 401


async def test_a_client_that_goes_away_is_no_error(app: ASGIApp) -> None:
    """A request that ends in the middle of its body is answered, for whoever still listens, with a 400."""
    messages: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    assert (await ask(app, "POST", TOKENS, messages=messages)).status == 400


async def test_a_slow_client_is_given_up(tmp_path: Path) -> None:
    """A body that does not arrive in time is a 408."""
    slow = build_at(tmp_path, Limits(receive_seconds=0.0))
    started: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}]
    assert (await ask(slow.app, "POST", TOKENS, messages=started)).status == 408


async def test_an_outage_is_a_503_and_names_no_file(app: ASGIApp, identity: BuiltinIdentity, tmp_path: Path) -> None:
    """While the users' file cannot be read, nothing is a 401: answers are 503 with Retry-After."""
    token = await sign_in(app, "demo")
    (tmp_path / "users.json").unlink()
    for answer in (
        await ask(app, "GET", "/identity/v3/projects", token=token),
        await ask(app, "GET", "/identity/v3/projects", token="A" * 100),
        await ask(app, "POST", TOKENS, body=password("demo")),
    ):
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert str(tmp_path).encode() not in answer.content
    assert (await ask(app, "GET", "/identity")).status == 300
