"""The users' file, the tokens signed with its key, and the clouds.yaml that goes with it."""

import asyncio
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from cellway.config import Limits
from cellway.errors import Conflict, Invalid, NotFound, Unavailable
from cellway.identity.clouds import write_clouds
from cellway.identity.store import PASSWORD_CHECKS_WAITING, Store
from cellway.identity.tokens import REVOCATIONS, Tokens
from cellway.outside import TokenVerifier

URL = "http://127.0.0.1:8774/identity"


class FakeClock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.elapsed = 0.0

    def now(self) -> datetime:
        return datetime(2026, 11, 20, 12) + timedelta(seconds=self.elapsed)

    def monotonic(self) -> float:
        return self.elapsed

    async def sleep(self, seconds: float) -> None:
        self.elapsed += seconds


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the users' file will be; the folder is not there yet."""
    return tmp_path / "data" / "users.json"


@pytest.fixture
def store(path: Path) -> Store:
    """A new users' file, opened."""
    return Store(path)


@pytest.fixture
def clock() -> FakeClock:
    """The clock of `tokens`."""
    return FakeClock()


@pytest.fixture
def tokens(store: Store, clock: FakeClock) -> Tokens:
    """Tokens of the users in `store`."""
    return Tokens(store, limits=Limits(), clock=clock)


def issue(store: Store, tokens: Tokens, name: str = "demo") -> str:
    """Return a new token of the user of this name in the project of this name."""
    user, project = store.find_user_named(name), store.find_project_named(name)
    assert user is not None
    assert project is not None
    return tokens.issue(user, project)[0]


def mode(path: Path) -> int:
    """Return who may do what with a file."""
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_holds_an_admin_and_a_member_with_projects_of_their_own(path: Path) -> None:
    """The first start makes both users, without passwords, in a file that only the owner may read."""
    store = Store(path)
    granted = {}
    for user in store.list_users():
        project = store.find_project(user.default_project_id)
        assert project is not None
        assert project.name == user.name
        assert user.password is None
        granted[user.name] = user.grants[project.id]
    assert granted == {"admin": ("admin", "member", "reader"), "demo": ("member", "reader")}
    assert {mode(each) for each in path.parent.iterdir()} == {0o600}


@pytest.mark.anyio
async def test_only_the_right_password_is_accepted(store: Store) -> None:
    """The right password is accepted; a wrong one and an unknown user are not."""
    store.set_passwords({"admin": "the same"})
    admin = store.find_user_named("admin")
    assert await store.check_password(admin, "the same")
    assert not await store.check_password(admin, "the same ")
    assert not await store.check_password(None, "the same")


def test_a_password_is_kept_as_a_salted_hash(store: Store, path: Path) -> None:
    """No password is in the file, equal passwords look different there, and a user's repr shows no hash."""
    store.set_passwords({"admin": "the same", "demo": "the same"})
    admin, demo = store.find_user_named("admin"), store.find_user_named("demo")
    assert admin is not None
    assert demo is not None
    assert admin.password != demo.password
    assert "the same" not in path.read_text()
    assert "digest" not in repr(admin)


@pytest.mark.anyio
async def test_nobody_signs_in_as_a_user_without_a_password(store: Store) -> None:
    """A user who has no password yet is refused whatever is given."""
    assert not await store.check_password(store.find_user_named("admin"), "")


@pytest.mark.anyio
async def test_password_checks_that_wait_are_bounded(store: Store) -> None:
    """A flood of sign-ins is refused beyond the bound, and those within it are answered."""
    flood = [store.check_password(None, "guess") for _ in range(PASSWORD_CHECKS_WAITING + 3)]
    outcomes = await asyncio.gather(*flood, return_exceptions=True)
    assert sum(isinstance(outcome, Unavailable) for outcome in outcomes) == 3
    assert outcomes.count(False) == PASSWORD_CHECKS_WAITING
    assert not await store.check_password(None, "guess")


def test_the_same_file_opens_with_the_same_contents(store: Store, path: Path) -> None:
    """Ids, the token key and passwords outlive the process."""
    again = Store(path)
    assert again.list_users() == store.list_users()
    assert again.token_key == store.token_key


def test_a_change_by_another_process_is_seen(store: Store, path: Path) -> None:
    """A user added through one store is found through another that was open before."""
    Store(path).create_user("rita", project="demo", role="reader", password="rita's")
    rita = store.find_user_named("rita")
    assert rita is not None
    assert list(rita.grants.values()) == [("reader",)]


def test_changes_at_the_same_time_are_all_kept(store: Store, path: Path) -> None:
    """Projects added by several stores at once are all there, and nothing else is left in the folder."""
    names = [f"project-{number}" for number in range(24)]
    stores = [store, Store(path), Store(path)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda at: stores[at % 3].create_project(names[at]), range(24)))
    assert {project.name for project in store.list_projects()} == {"admin", "demo", *names}
    assert {each.name for each in path.parent.iterdir()} == {"users.json", "users.json.lock"}


def test_first_starts_at_the_same_time_agree(path: Path) -> None:
    """Processes that start on an empty folder at once all have the same token key."""
    with ThreadPoolExecutor(4) as pool:
        keys = set(pool.map(lambda _: Store(path).token_key, range(4)))
    assert len(keys) == 1


def test_names_roles_and_projects_are_checked(store: Store) -> None:
    """A taken or malformed name, an unknown role or project, and a bad password are refused and change nothing."""
    before = (store.list_users(), store.list_projects())
    with pytest.raises(Conflict):
        store.create_project("demo")
    with pytest.raises(Conflict):
        store.create_user("demo", project="demo", role="member", password="x")
    with pytest.raises(NotFound):
        store.create_user("new", project="none", role="member", password="x")
    with pytest.raises(NotFound):
        store.set_passwords({"demo": "x", "nobody": "x"})
    with pytest.raises(Invalid):
        store.create_user("new", project="demo", role="root", password="x")
    for name in ("", "n" * 256, "a\x00b", "a\nb", "a\udcffb"):
        with pytest.raises(Invalid):
            store.create_project(name)
        with pytest.raises(Invalid):
            store.create_user(name, project="demo", role="member", password="x")
    for password in ("", "p" * 4097, "a\udcffb"):
        with pytest.raises(Invalid):
            store.create_user("new", project="demo", role="member", password=password)
    assert (store.list_users(), store.list_projects()) == before


@pytest.mark.parametrize("text", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"version": 2}', b"null"])
def test_a_file_that_is_not_understood_is_refused_and_kept(path: Path, text: bytes) -> None:
    """A damaged users' file stops the start with a clear error and is not overwritten."""
    path.parent.mkdir()
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(Invalid, match=r"users\.json"):
        Store(path)
    assert path.read_bytes() == text


@pytest.mark.parametrize("change", ["unknown project", "unknown role", "short key"])
def test_a_file_that_contradicts_itself_is_refused(store: Store, path: Path, change: str) -> None:
    """A users' file with a dangling project or role, or a weak key, stops the start."""
    document = msgspec.json.decode(path.read_bytes())
    if change == "unknown project":
        document["projects"].pop()
    elif change == "unknown role":
        document["roles"].pop()
    else:
        document["token_key"] = "AAAA"
    path.write_bytes(msgspec.json.encode(document))
    with pytest.raises(Invalid):
        Store(path)


def test_a_file_that_others_may_read_is_refused(store: Store, path: Path) -> None:
    """A key that others may have read is not used."""
    path.chmod(0o640)
    with pytest.raises(Invalid, match="chmod 600"):
        Store(path)


def test_a_file_that_vanishes_is_an_outage_and_not_a_wrong_password(store: Store, path: Path) -> None:
    """While the users' file cannot be read, its readers raise Unavailable; when it is back they go on."""
    aside = path.rename(path.with_name("aside"))
    with pytest.raises(Unavailable):
        store.find_user_named("demo")
    aside.rename(path)
    assert store.find_user_named("demo") is not None


@pytest.mark.anyio
async def test_a_token_says_who_holds_it(store: Store, tokens: Tokens) -> None:
    """A new token verifies to its user, project and roles, in any process with the same file."""
    verifier: TokenVerifier = tokens
    token = issue(store, tokens, "admin")
    identity = await verifier.verify(token)
    assert identity is not None
    assert (identity.user_name, identity.project_name) == ("admin", "admin")
    assert identity.roles == {"admin", "member", "reader"}
    other = Tokens(Store(store._path), limits=Limits(), clock=FakeClock())
    assert await other.verify(token) == identity


@pytest.mark.anyio
async def test_an_altered_token_is_nobody(store: Store, tokens: Tokens) -> None:
    """No change of one character, no other spelling and no foreign text verifies."""
    token = issue(store, tokens)
    assert await tokens.verify(token) is not None
    altered = {token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :] for at in range(len(token))}
    spelled = {token + "=", token + " ", token[:9] + "\n" + token[9:], "!" + token, token[:-1], token + "A"}
    foreign = {"", "notused", "\x00", "é", "\udcff", "A" * 100_000, "====", "A" * 44}
    for text in altered | spelled | foreign:
        assert await tokens.verify(text) is None, text


@pytest.mark.anyio
async def test_a_token_of_another_file_is_nobody(store: Store, tokens: Tokens, tmp_path: Path) -> None:
    """A token signed with another key does not verify."""
    other = Store(tmp_path / "other.json")
    assert await tokens.verify(issue(other, Tokens(other, limits=Limits(), clock=FakeClock()))) is None


@pytest.mark.anyio
async def test_a_token_ends_at_its_expiry_even_when_it_is_remembered(
    store: Store, tokens: Tokens, clock: FakeClock
) -> None:
    """The cache never carries a token beyond its expiry, and a token made from another expires with it."""
    life = Limits().token_seconds
    token = issue(store, tokens)
    clock.elapsed = life - 1
    verified = tokens.inspect(token)
    assert verified is not None
    user, project = store.find_user_named("demo"), store.find_project_named("demo")
    assert user is not None
    assert project is not None
    child, _ = tokens.issue(user, project, verified.claims)
    assert await tokens.verify(child) is not None
    clock.elapsed = life
    assert await tokens.verify(token) is None
    assert await tokens.verify(child) is None


@pytest.mark.anyio
async def test_a_new_password_ends_the_tokens_of_the_old_one(store: Store, tokens: Tokens, clock: FakeClock) -> None:
    """Within the cache time a token of the old password stops; other users' tokens go on."""
    token, admins = issue(store, tokens), issue(store, tokens, "admin")
    assert await tokens.verify(token) is not None
    store.set_passwords({"demo": "another"})
    clock.elapsed = Limits().token_cache_seconds
    assert await tokens.verify(token) is None
    assert await tokens.verify(admins) is not None


@pytest.mark.anyio
async def test_a_revoked_token_ends_at_once(store: Store, tokens: Tokens) -> None:
    """Revocation stops the one token, although it was verified a moment ago."""
    token, other = issue(store, tokens), issue(store, tokens)
    verified = tokens.inspect(token)
    assert verified is not None
    tokens.revoke(verified.claims)
    assert await tokens.verify(token) is None
    assert await tokens.verify(other) is not None


@pytest.mark.anyio
async def test_revocations_are_bounded_and_forgotten_after_expiry(
    store: Store, tokens: Tokens, clock: FakeClock
) -> None:
    """A flood of revocations is refused at the bound, and there is room again once the tokens have expired."""
    verified = tokens.inspect(issue(store, tokens))
    assert verified is not None
    for number in range(REVOCATIONS):
        tokens.revoke(msgspec.structs.replace(verified.claims, audit_ids=(str(number),)))
    with pytest.raises(Unavailable):
        tokens.revoke(verified.claims)
    clock.elapsed = Limits().token_seconds
    later = tokens.inspect(issue(store, tokens))
    assert later is not None
    tokens.revoke(later.claims)
    assert len(tokens._revoked) == 1


def signs_in(store: Store, clouds: Path) -> bool:
    """Tell whether both clouds of the file sign in."""
    document = msgspec.yaml.decode(clouds.read_bytes())["clouds"]
    auths = [document["cellway"]["auth"], document["cellway-admin"]["auth"]]
    assert [auth["username"] for auth in auths] == ["demo", "admin"]
    users = [store.find_user_named(auth["username"]) for auth in auths]
    hashes = [user.password for user in users if user is not None and user.password is not None]
    return [known.matches(auth["password"]) for known, auth in zip(hashes, auths, strict=True)] == [True, True]


def test_the_first_clouds_file_signs_both_users_in(path: Path) -> None:
    """The written file is private, names both clouds, and its random passwords are the users'."""
    store, clouds = Store(path), path.with_name("clouds.yaml")
    write_clouds(clouds, store, URL)
    assert signs_in(store, clouds)
    assert mode(clouds) == 0o600
    cloud = msgspec.yaml.decode(clouds.read_bytes())["clouds"]["cellway"]
    assert (cloud["auth_type"], cloud["region_name"], cloud["identity_api_version"]) == ("password", "RegionOne", 3)
    assert cloud["auth"]["auth_url"] == URL


def test_another_address_keeps_the_passwords_and_what_others_added(path: Path) -> None:
    """A later start with another port changes the address alone, and the same start changes nothing."""
    store, clouds = Store(path), path.with_name("clouds.yaml")
    write_clouds(clouds, store, URL)
    document = msgspec.yaml.decode(clouds.read_bytes())
    document["clouds"]["elsewhere"] = {"auth": {"auth_url": "http://192.0.2.1"}}
    document["clouds"]["cellway"]["verify"] = False
    clouds.write_bytes(msgspec.yaml.encode(document))
    users = store.list_users()
    write_clouds(clouds, store, "http://127.0.0.1:9999/identity")
    for cloud in ("cellway", "cellway-admin"):
        document["clouds"][cloud]["auth"]["auth_url"] = "http://127.0.0.1:9999/identity"
    assert msgspec.yaml.decode(clouds.read_bytes()) == document
    written = clouds.stat()
    write_clouds(clouds, store, "http://127.0.0.1:9999/identity")
    assert clouds.stat() == written
    assert store.list_users() == users


@pytest.mark.parametrize("lost", ["clouds.yaml", "users.json"])
def test_a_lost_file_is_made_anew_and_fits_the_other(path: Path, lost: str) -> None:
    """Whichever of the two files is lost, the next start leaves both users able to sign in."""
    clouds = path.with_name("clouds.yaml")
    write_clouds(clouds, Store(path), URL)
    before = clouds.read_bytes()
    path.with_name(lost).unlink()
    store = Store(path)
    write_clouds(clouds, store, URL)
    assert signs_in(store, clouds)
    assert (clouds.read_bytes() == before) == (lost == "users.json")


def test_a_clouds_file_that_others_may_read_is_closed(path: Path) -> None:
    """A start takes other users' access to the passwords away."""
    store, clouds = Store(path), path.with_name("clouds.yaml")
    write_clouds(clouds, store, URL)
    clouds.chmod(0o644)
    write_clouds(clouds, store, URL)
    assert mode(clouds) == 0o600


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2",
        "- 1",
        "clouds: [1]",
        "clouds: {cellway: 5}",
        "clouds: {cellway: {auth: {password: 12}}}",
        "a: &a [*a]\n? {}",
    ],
)
def test_a_clouds_file_that_is_not_understood_is_refused_and_kept(path: Path, text: str) -> None:
    """A clouds.yaml that cannot be merged is left alone, no password is changed, and the error quotes none of it."""
    store, clouds = Store(path), path.with_name("clouds.yaml")
    clouds.write_text(text)
    with pytest.raises(Invalid, match=r"clouds\.yaml") as refused:
        write_clouds(clouds, store, URL)
    assert text not in str(refused.value)
    assert clouds.read_text() == text
    assert all(user.password is None for user in store.list_users())
