"""The proxy that breaks connections does what its modes say, since every test of an outage relies on it."""

import gc
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress

import pytest

from tests import proxy
from tests.proxy import Proxy


class Echo(socketserver.BaseRequestHandler):
    """Answers what it hears, and keeps it."""

    heard: list[bytes]

    def handle(self) -> None:
        while piece := self.request.recv(65536):
            self.heard.append(piece)
            self.request.sendall(piece)


@pytest.fixture
def heard() -> list[bytes]:
    """What the server behind the proxy heard."""
    return []


@pytest.fixture
def broken(heard: list[bytes]) -> Iterator[Proxy]:
    """A proxy before a server that echoes."""

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            """A connection that is reset is no error here."""

    handler: type[Echo] = type("Handler", (Echo,), {"heard": heard})
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        with proxy.opened(server.server_address[1]) as made:
            yield made
        server.shutdown()
        thread.join(60)


def connect(to: Proxy, timeout: float = 60.0) -> socket.socket:
    """Connect through the proxy."""
    return socket.create_connection(("127.0.0.1", to.port), timeout)


def ask(connection: socket.socket, words: bytes) -> bytes:
    """Say something and return the whole echo, or what came before the end."""
    connection.sendall(words)
    answer = b""
    while len(answer) < len(words) and (piece := connection.recv(65536)):
        answer += piece
    return answer


def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` is true."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 60, "it never came true"
        time.sleep(0.001)


def is_silent(connection: socket.socket) -> bool:
    """Tell whether nothing comes, for a moment."""
    connection.settimeout(0.2)
    try:
        return connection.recv(1) is None
    except TimeoutError:
        return True


def test_it_passes_both_ways(broken: Proxy) -> None:
    """Whatever is said arrives, and so does the answer."""
    with closing(connect(broken)) as connection:
        assert ask(connection, b"x" * 300_000) == b"x" * 300_000
    assert (broken.accepted, broken.cuts) == (1, 0)


def test_it_passes_an_end_on() -> None:
    """Whatever the server said before it closed arrives at a client that reads late, and then the end."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        between = stack.enter_context(proxy.opened(listener.getsockname()[1]))
        client = stack.enter_context(connect(between))
        with listener.accept()[0] as server:
            server.sendall(b"x" * 300_000)
        assert stack.enter_context(client.makefile("rb")).read() == b"x" * 300_000


def test_it_goes_to_the_next_of_several_servers(broken: Proxy) -> None:
    """Each connection has an order of its own, servers that refuse are passed over, and without any it is closed."""
    orders = [[1, broken.port], [broken.port, 1], [1]]
    with proxy.opened(lambda: orders.pop(0)) as front:
        for _ in range(2):
            with closing(connect(front)) as connection:
                assert ask(connection, b"x") == b"x"
        with closing(connect(front)) as connection:
            assert connection.recv(1) == b""
    assert broken.accepted == 2


def test_an_unfinished_handshake_does_not_keep_it(broken: Proxy) -> None:
    """A client that connects to the end of an encrypted line and says nothing is cut when the proxy is closed."""
    with proxy.opened(broken.port, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)) as line:
        connection = connect(line)
        until(lambda: line.accepted == 1)
    with connection:
        assert connection.recv(1) == b""


def test_it_refuses_and_comes_back_on_the_same_port(broken: Proxy) -> None:
    """While it refuses nobody connects, and who was connected is reset."""
    with closing(connect(broken)) as connection:
        ask(connection, b"x")
        broken.refuse()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(broken)
    broken.heal()
    with closing(connect(broken)) as connection:
        assert ask(connection, b"again") == b"again"


def test_it_resets(broken: Proxy) -> None:
    """Open connections end with a reset; new ones work."""
    with closing(connect(broken)) as connection:
        ask(connection, b"x")
        broken.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with closing(connect(broken)) as connection:
        assert ask(connection, b"again") == b"again"


def test_it_hangs(broken: Proxy, heard: list[bytes]) -> None:
    """Old and new connections stay open and silent, the server hears nothing, and healing resets them."""
    with closing(connect(broken)) as old:
        ask(old, b"before")
        broken.hang()
        with closing(connect(broken)) as new:
            for connection in (old, new):
                connection.sendall(b"while it hangs")
                assert is_silent(connection)
            broken.heal()
            for connection in (old, new):
                connection.settimeout(60)
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
    assert heard == [b"before"]


def test_it_holds() -> None:
    """What a client says is kept back, however much it is, answers pass, and healing loses nothing of it."""
    said = b"0123456789" * 1_000_000
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        held = stack.enter_context(proxy.opened(listener.getsockname()[1]))
        client = stack.enter_context(connect(held))
        server = stack.enter_context(listener.accept()[0])
        held.hold()
        speaker = threading.Thread(target=client.sendall, args=(said,))
        speaker.start()
        assert is_silent(server)
        server.sendall(b"meanwhile")
        assert client.recv(9) == b"meanwhile"
        assert speaker.is_alive()
        held.heal()
        server.settimeout(60)
        assert stack.enter_context(server.makefile("rb")).read(len(said)) == said
        speaker.join(60)


def test_it_stalls_in_the_middle_of_an_answer(broken: Proxy) -> None:
    """So many bytes come, and no more."""
    broken.stall(after=5)
    with closing(connect(broken)) as connection:
        connection.sendall(b"0123456789")
        assert connection.recv(10) == b"01234"
        assert is_silent(connection)


def test_it_cuts_after_the_server_has_done_it(broken: Proxy, heard: list[bytes]) -> None:
    """Words that match reach the server, the answer is lost, it is counted, and only so often."""
    broken.cut(rb"write.*COMMIT\b", times=1)
    with closing(connect(broken)) as connection:
        assert ask(connection, b"READ COMMITTED") == b"READ COMMITTED"
        assert ask(connection, b"write this") == b"write this"
        connection.sendall(b"COMMIT")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert heard[-1] == b"COMMIT"
    assert broken.cuts == 1
    with closing(connect(broken)) as connection:
        assert ask(connection, b"write COMMIT") == b"write COMMIT"


def test_it_cuts_silently(broken: Proxy, heard: list[bytes]) -> None:
    """The answer is kept back and the connection stays open: only a deadline tells."""
    broken.cut(b"COMMIT", silently=True)
    with closing(connect(broken)) as connection:
        connection.sendall(b"COMMIT")
        until(lambda: broken.cuts == 1)
        assert is_silent(connection)
    assert (heard, broken.cuts) == ([b"COMMIT"], 1)


def test_it_is_slow(broken: Proxy) -> None:
    """A delay holds for each way, and a rate for the answer."""
    with closing(connect(broken)) as connection:
        for slow in ({"delay_seconds": 0.1}, {"bytes_per_second": 1000.0}):
            broken.slow(**slow)
            began = time.monotonic()
            assert ask(connection, b"x" * 200) == b"x" * 200
            assert time.monotonic() - began >= 0.2


def test_it_counts_open_connections(broken: Proxy) -> None:
    """A connection that the client closes is closed to the server too."""
    with closing(connect(broken)) as connection:
        ask(connection, b"x")
        assert broken.connections == 1
    until(lambda: broken.connections == 0)


def test_a_connection_that_comes_while_it_refuses_is_not_lost(broken: Proxy) -> None:
    """However the two meet, nothing stays open: what is left unclosed is an error of this test."""
    over = threading.Event()

    def knock() -> None:
        while not over.is_set():
            with suppress(OSError):
                connect(broken, 5.0).close()

    clients = [threading.Thread(target=knock) for _ in range(4)]
    for client in clients:
        client.start()
    for _ in range(50):
        broken.refuse()
        broken.heal()
    over.set()
    for client in clients:
        client.join()
    assert broken.accepted > 0
    gc.collect()
