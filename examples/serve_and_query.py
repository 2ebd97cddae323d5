"""Start `lillama serve`, ask it, stream an answer, and stop it.

    python examples/serve_and_query.py examples/teachers/mixtral --prompt "def read(path):"

Nothing but Python's own library talks to the server here; OpenAI's client does it too
(docs/serving.md).
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LISTENING = re.compile(r"http://[\w.:\[\]-]+")


@contextmanager
def server(model: Path) -> Iterator[str]:
    """The address of a server on a free port; SIGTERM at the end, as from a service manager."""
    command = [sys.executable, "-m", "lillama.cli.app", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        # its log; the address comes when it is ready, no more lines when it ended instead
        for line in process.stderr:
            if found := LISTENING.search(line):
                break
            print(line, end="", file=sys.stderr)
        else:
            raise SystemExit(f"the server ended with code {process.wait()}")
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def post(url: str, body: dict) -> urllib.request.Request:
    data = json.dumps(body).encode()
    return urllib.request.Request(url, data, {"Content-Type": "application/json"})


def ask(url: str, prompt: str, max_tokens: int) -> str:
    """One answer, whole."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    with urllib.request.urlopen(post(f"{url}/v1/completions", body), timeout=300) as answer:
        return json.load(answer)["choices"][0]["text"]


def stream(url: str, prompt: str, max_tokens: int) -> Iterator[str]:
    """The same in pieces, as they come: server-sent events, `data: {...}` a line."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    with urllib.request.urlopen(post(f"{url}/v1/completions", body), timeout=300) as answer:
        for line in answer:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                return
            if data:
                yield json.loads(data)["choices"][0]["text"]


def main(arguments: list[str] | None = None) -> tuple[str, str]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default="def read(path):")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args(arguments)
    with server(options.model) as url:
        print(f"{url} is up")
        whole = ask(url, options.prompt, options.max_tokens)
        print(options.prompt + whole)
        print("the same, streamed:")
        pieces = []
        for piece in stream(url, options.prompt, options.max_tokens):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
    return whole, "".join(pieces)


if __name__ == "__main__":
    main(sys.argv[1:])
