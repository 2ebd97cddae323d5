"""`lillama serve` as a process of its own: how it starts, what it says, how it ends."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs lillama[serve]")

from lillama.cli import app as cli  # noqa: E402
from lillama.config import ServeConfig  # noqa: E402
from lillama.errors import InputError  # noqa: E402
from lillama.serve.http import bind, serve  # noqa: E402
from lillama.serve.http.server import read_keys  # noqa: E402
from tests.serve.http.running import Running, read_all, wait_for  # noqa: E402

ROOT = Path(__file__).parents[3]
SCRIPT = "from tests.serve.http.fake_engine import serve_fake; serve_fake({step_s})"


@contextmanager
def process(model: Path, step_s: float, *options: str) -> Iterator[tuple[Any, Running]]:
    """The command line with a fake engine -> the process, and how to ask it."""
    command = [sys.executable, "-c", SCRIPT.format(step_s=step_s), "serve", str(model)]
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels"))
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([paths, environment.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [*command, "--port", "0", *options],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = child.stderr.readline()
        found = re.search(r"lillama: .* is at (http://127\.0\.0\.1:\d+); Ctrl-C ends it", line)
        assert found, line + child.stderr.read()
        server: Any = type("Server", (), {"url": found[1]})
        yield child, Running(None, None, server)  # type: ignore[arg-type]
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


def test_sigterm_under_load_finishes_what_was_accepted(mixtral):
    with process(mixtral, 0.01, "--max-batch", "4", "--served-name", "busy") as (child, server):
        assert server.request("GET", "/v1/models")[2]["data"][0]["id"] == "busy"
        with server.connect() as connection:  # what clients do wrong does not fill the log
            connection.sendall(b"nonsense\r\n\r\n")
            assert b" 400 " in read_all(connection)
        answers: dict[int, Any] = {}

        def ask(i: int) -> None:
            body = {"prompt": [100 + i], "max_tokens": 30, "stream": i % 2 == 0}
            answers[i] = server.request("POST", "/v1/completions", body)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.metric("lillama_waiting") == 4, "8 requests")
        child.send_signal(signal.SIGTERM)
        wait_for(lambda: server.request("GET", "/health")[0] == 503, "the drain")
        assert server.complete(prompt="late")[0] == 503
        for thread in threads:
            thread.join(30)
        assert child.wait(10) == 0
        assert child.stderr.read() == ""
    assert len(answers) == 8
    for i, (status, _, answer) in answers.items():
        assert status == 200
        if i % 2:
            assert answer["usage"]["completion_tokens"] == 30
        else:
            events = answer.decode().split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""]
            last = json.loads(events[-3].removeprefix("data: "))
            assert last["choices"][0]["finish_reason"] == "length"


@pytest.fixture
def command(monkeypatch, capsys):
    """command("serve", ...) -> exit code and the one line on stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lillama", *arguments])
        previous = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as caught:
                cli.main()
        finally:
            signal.signal(signal.SIGTERM, previous)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return int(caught.value.code or 0), error

    return run


def test_serve_without_the_extra_says_what_to_install(command, mixtral, monkeypatch):
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "uvicorn" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    code, error = command("serve", str(mixtral))
    assert code == 2 and "pip install 'lillama[serve]'" in error and "(uvicorn)" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port must lie between 0 and 65535, got 70000"),
        (["--max-batch", "0"], "--max-batch must be at least 1, got 0"),
        (["--max-queue", "-1"], "--max-queue must be at least 1"),
        (["--max-length", "1"], "--max-length must be at least 2"),
        (["--request-timeout-s", "nan"], "--request-timeout-s must be a finite number"),
        (["--client-timeout-s", "0"], "--client-timeout-s must be a finite number"),
        (["--drain-s", "-1"], "--drain-s must be a finite number"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N"),
        (["--dtype", "int4"], "--dtype must be one of"),
        (["--served-name", ""], "--served-name must not be empty"),
        (["--host", ""], "--host must not be empty"),
    ],
    ids=lambda value: "-".join(value)[2:] if isinstance(value, list) else "",
)
def test_serve_refuses_options_that_make_no_sense(command, options, message):
    code, error = command("serve", "somewhere", *options)
    assert code == 2 and message in error


def test_serve_says_so_when_the_port_is_taken():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1 port {port}: .*in use"):
            bind("127.0.0.1", port)
    with pytest.raises(InputError, match="is no address of this machine"):
        bind("no.such.host.invalid", 0)
    with pytest.raises(InputError, match="cannot listen on 192.0.2.1"):
        bind("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("\n \n", "holds no key"),
        ("short\n", "16 or more printable"),
        ("has a space in the middle\n", "without spaces"),
        ("k\u00e9y-of-more-than-16-signs\n", "cannot be read as ASCII"),
    ],
)
def test_key_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "keys"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_keys(path)
    assert "short" not in str(caught.value)


def test_key_file_has_one_key_a_line(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\n" + "a" * 16 + "\n  " + "b" * 32 + " \n", "ascii")
    assert read_keys(path) == ["a" * 16, "b" * 32]
    assert read_keys(None) == []
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_serve_refuses_an_unknown_option(tmp_path):
    with pytest.raises(TypeError, match="workers"):
        serve(tmp_path, workers=2)
    assert ServeConfig(model=tmp_path).host == "127.0.0.1"
