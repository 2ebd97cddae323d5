"""Slow, absent and too many clients, failures of the engine, and the end of the server."""

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest

pytest.importorskip("fastapi", reason="needs lillama[serve]")

from lillama.serve.http.tokens import LONG_TEXT  # noqa: E402
from tests.serve.http.running import post_bytes, read_all, running, wait_for  # noqa: E402

ASK = json.dumps({"prompt": "a", "max_tokens": 400}).encode()
STREAM = json.dumps({"prompt": "a", "max_tokens": 400, "stream": True}).encode()
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SLOW_S = 0.4


@pytest.fixture(scope="module")
def server(tokenizer):
    """400 tokens take about 2 s; a client may take 0.4 s."""
    with running(
        deepcopy(tokenizer), step_s=0.005, client_timeout_s=SLOW_S, max_batch=4, max_queue=3
    ) as found:
        yield found


@pytest.fixture(autouse=True)
def _still_well(request):
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        engine = server.engine
        wait_for(lambda: not (engine.running or engine.waiting), "an empty engine")
        assert server.complete(prompt="a", max_tokens=2)[0] == 200


def finished(server, reason: str) -> int:
    return server.engine.finished.get(reason, 0)


@pytest.mark.parametrize("body", [ASK, STREAM], ids=["whole", "stream"])
def test_a_client_that_leaves_is_cancelled(server, body):
    before = finished(server, "cancelled")
    with server.connect() as connection:
        connection.sendall(post_bytes(body))
        if body is STREAM:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        wait_for(lambda: server.engine.running, "a running request")
    wait_for(lambda: finished(server, "cancelled") == before + 1, "the cancellation")
    assert server.metric('lillama_choices_total{reason="disconnected"}') >= 1


def test_a_client_that_leaves_the_queue_is_cancelled(server):
    before = finished(server, "cancelled")
    server.engine.paused = True
    with server.connect() as connection:
        connection.sendall(post_bytes(ASK))
        wait_for(lambda: server.engine.waiting, "a waiting request")
    submitted = server.engine.submitted[-1]
    wait_for(lambda: submitted.cancelled, "the cancellation")
    server.engine.paused = False
    wait_for(lambda: finished(server, "cancelled") == before + 1, "its end")


def test_a_full_queue_says_when_to_come_back(server):
    server.engine.paused = True
    connections = [server.connect() for _ in range(3)]
    for connection in connections:
        connection.sendall(post_bytes(ASK))
    wait_for(lambda: len(server.engine.waiting) == 3, "a full queue")
    status, headers, document = server.request("POST", "/v1/completions", {"prompt": "a"})
    assert (status, headers["retry-after"]) == (429, "1")
    error = document["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert server.metric("lillama_waiting") == 3
    for connection in connections:
        connection.close()
    wait_for(lambda: all(c.cancelled for c in server.engine.submitted[-3:]), "cancellations")
    server.engine.paused = False


def test_a_request_of_many_choices_is_queued_whole_or_not_at_all(server):
    server.engine.paused = True
    before = len(server.engine.submitted)
    status, document = server.complete(prompt="a", n=4)
    assert (status, document["error"]["code"]) == (429, "queue_full")
    queued = server.engine.submitted[before:]
    assert len(queued) == 3 and all(completion.cancelled for completion in queued)
    server.engine.paused = False


def test_a_failing_choice_ends_the_others(server):
    before = finished(server, "cancelled")
    status, document = server.complete(prompt=["a", "b~", "c"], max_tokens=300)
    assert status == 500 and "out of imaginary memory" in document["error"]["message"]
    wait_for(lambda: finished(server, "cancelled") == before + 2, "the others' end")


def test_others_go_on_while_one_fails(server):
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(server.complete(prompt="a", max_tokens=60))
    )
    thread.start()
    assert server.complete(prompt="b^")[0] == 500
    thread.join()
    status, document = answers[0]
    assert status == 200 and document["usage"]["completion_tokens"] == 60


def trickle(connection: socket.socket, data: bytes) -> tuple[bytes, float]:
    """A byte every 50 ms until the server has had enough -> its answer, and after how long."""
    begin_s = time.monotonic()
    connection.settimeout(0.05)
    answer = b""
    for i in range(len(data)):
        try:
            connection.sendall(data[i : i + 1])
            part = connection.recv(65536)
            answer += part
            if not part:
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return answer, time.monotonic() - begin_s


def slow_header(connection: socket.socket) -> None:
    answer, seconds = trickle(connection, post_bytes(ASK))
    assert b" 408 " in answer.split(b"\r\n")[0] and b"header_timeout" in answer
    assert seconds < SLOW_S + 1


def slow_body(connection: socket.socket) -> None:
    connection.sendall(post_bytes(ASK)[: -len(ASK)])
    answer, seconds = trickle(connection, ASK)
    assert b" 408 " in answer.split(b"\r\n")[0] and b"body_timeout" in answer
    assert b"connection: close" in answer and seconds < SLOW_S + 1


def slow_second_header(connection: socket.socket) -> None:
    connection.sendall(GET)
    health = b""
    while b'"ok"' not in health:
        health += connection.recv(65536)
    slow_header(connection)


def idle(connection: socket.socket, first: bytes = b"") -> None:
    begin_s = time.monotonic()
    connection.sendall(first)
    answer = read_all(connection)
    assert time.monotonic() - begin_s < SLOW_S + 1
    assert bool(answer) == bool(first) and b" 408 " not in answer


def idle_after_an_answer(connection: socket.socket) -> None:
    idle(connection, GET)


def test_slow_clients_are_cut_off(server):
    """All at once: each takes as long as a client may."""

    def visit(behave: Callable[[socket.socket], None]) -> None:
        with server.connect() as connection:
            behave(connection)

    kinds = (slow_header, slow_body, slow_second_header, idle, idle_after_an_answer)
    with ThreadPoolExecutor(len(kinds)) as pool:
        visits = [pool.submit(visit, behave) for behave in kinds]
    for done in visits:
        done.result()


def test_connections_beyond_the_limit_are_refused(tokenizer):
    with running(deepcopy(tokenizer), max_connections=3) as small:
        connections = [small.connect() for _ in range(3)]
        wait_for(lambda: len(small.server.server_state.connections) == 3, "three connections")
        with small.connect() as connection:
            answer = read_all(connection)
        assert b" 503 " in answer.split(b"\r\n")[0] and b"too_many_connections" in answer
        for connection in connections:
            connection.close()
        wait_for(lambda: not small.server.server_state.connections, "no connection")
        assert small.complete(prompt="a")[0] == 200
        assert small.metric("lillama_refused_connections_total") == 1


def test_a_client_that_does_not_read_is_cut_off(tokenizer):
    """Its answer, much larger than the kernel's buffers, waits in the server; not for ever."""
    with running(
        deepcopy(tokenizer), client_timeout_s=SLOW_S, max_body_bytes=2**24, max_length=2**23
    ) as wide:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((wide.host, wide.port))
        body = {"prompt": "a" * 500_000, "max_tokens": 1, "echo": True, "n": 16}
        connection.sendall(post_bytes(json.dumps(body).encode()))
        states = wide.server.server_state.connections
        wait_for(lambda: any("write" in state.timers for state in states), "a full buffer", 30)
        wait_for(lambda: not states, "the end of the connection", SLOW_S + 2)
        connection.close()
        assert wide.complete(prompt="a")[0] == 200


def test_a_request_has_a_time_limit(tokenizer):
    with running(deepcopy(tokenizer), step_s=0.01, request_timeout_s=0.3) as hasty:
        status, document = hasty.complete(prompt="a", max_tokens=400)
        assert (status, document["error"]["code"]) == (504, "request_timeout")
        status, _, raw = hasty.request(
            "POST", "/v1/completions", {"prompt": "a", "max_tokens": 400, "stream": True}
        )
        events = raw.decode().split("\n\n")
        assert status == 200 and "request_timeout" in events[-2] and len(events) > 5
        assert "[DONE]" not in raw.decode()
        wait_for(lambda: hasty.engine.finished.get("cancelled") == 2, "both cancellations")
        assert hasty.complete(prompt="a", max_tokens=2)[0] == 200
        assert hasty.metric('lillama_choices_total{reason="timeout"}') == 2


def test_long_texts_hold_up_neither_short_ones_nor_the_end(tokenizer):
    """While a long text is tokenized others are answered, and who asked for it may leave or run
    out of time; what nobody waits for any more is not tokenized."""
    free, taken = threading.Event(), []

    class Slow(type(tokenizer)):
        def __call__(self, text, **options):
            if len(text) > LONG_TEXT:
                taken.append(text[0])
                assert free.wait(20)
            return super().__call__(text, **options)

    slow = deepcopy(tokenizer)
    slow.__class__ = Slow
    with running(slow, request_timeout_s=0.5, max_length=2**20) as hasty:

        def ask(letter: str) -> socket.socket:
            connection = hasty.connect()
            connection.sendall(post_bytes(json.dumps({"prompt": letter * 60_000}).encode()))
            return connection

        with ask("a") as first:
            wait_for(lambda: taken, "a long text")
            with ask("b"):
                wait_for(lambda: len(hasty.server.server_state.tasks) == 2, "a second one")
            assert hasty.complete(prompt="a")[0] == 200
            assert b" 504 " in first.recv(65536)
        free.set()
        with ask("c") as last:
            assert b" 200 " in last.recv(65536)
        assert taken == ["a", "c"]


def test_an_error_that_nobody_expected_is_a_500(tokenizer, monkeypatch):
    with running(deepcopy(tokenizer)) as broken:
        monkeypatch.setattr(broken.engine, "submit", lambda *arguments: 1 / 0)
        status, document = broken.complete(prompt="a")
        assert (status, document["error"]["code"]) == (500, "internal_error")
        assert "division" not in document["error"]["message"]
        monkeypatch.undo()
        assert broken.complete(prompt="a")[0] == 200


def test_ipv6(tokenizer):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 in this Python")
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with running(deepcopy(tokenizer), host="::1") as six:
        assert six.url.startswith("http://[::1]:")
        assert six.complete(prompt="a")[0] == 200


def test_an_engine_that_died_is_told_from_a_full_queue(tokenizer):
    with running(deepcopy(tokenizer)) as dead:
        assert dead.request("GET", "/health")[0] == 200
        dead.engine.stop()
        assert dead.request("GET", "/health")[0] == 503
        status, document = dead.complete(prompt="a")
        assert (status, document["error"]["code"]) == (503, "engine_stopped")
        status, _, document = dead.request("GET", "/health")
        assert (status, document) == (503, {"status": "stopped"})


def test_a_stop_finishes_what_was_accepted_and_refuses_the_rest(tokenizer):
    with running(deepcopy(tokenizer), drain_s=20) as ending:
        ending.engine.paused = True
        answers = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(ending.complete(prompt="a", max_tokens=50))
            )
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(ending.engine.waiting) == 5, "five requests")
        ending.server.stop()
        wait_for(lambda: ending.request("GET", "/health")[0] == 503, "the drain")
        status, headers, document = ending.request("POST", "/v1/completions", {"prompt": "a"})
        assert (status, document["error"]["code"]) == (503, "draining")
        assert headers["retry-after"] == "5" and headers["connection"] == "close"
        ending.engine.paused = False
        for thread in threads:
            thread.join(20)
        assert [status for status, _ in answers] == [200] * 5
        assert {document["usage"]["completion_tokens"] for _, document in answers} == {50}


def test_a_second_stop_does_not_wait(tokenizer):
    with running(deepcopy(tokenizer), step_s=0.05, drain_s=60) as ending:
        connection = ending.connect()
        connection.sendall(post_bytes(ASK))
        wait_for(lambda: ending.engine.running, "a request, which would take 20 s")
        begin_s = time.monotonic()
        ending.server.stop()
        wait_for(lambda: ending.request("GET", "/health")[0] == 503, "the drain")
        # the second is that of the with statement
    assert time.monotonic() - begin_s < 5
    connection.close()


def test_a_stop_cuts_off_what_takes_too_long(tokenizer):
    with running(deepcopy(tokenizer), step_s=0.02, drain_s=0.2) as ending:
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(ending.complete(prompt="a", max_tokens=500))
        )
        thread.start()
        wait_for(lambda: ending.engine.running, "a running request")
        begin_s = time.monotonic()
        ending.server.stop()
        thread.join(10)
        status, document = answers[0]
        assert (status, document["error"]["code"]) == (503, "stopped")
        assert time.monotonic() - begin_s < 3
