"""Requests that cannot be done: each has its status and says why, and harms nobody else."""

import json
from copy import deepcopy

import pytest

pytest.importorskip("fastapi", reason="needs lillama[serve]")

from tests.serve.http.running import JSON, post_bytes, read_all, running, wait_for  # noqa: E402

HI = [{"role": "user", "content": "hi"}]
LIMIT = 4096


@pytest.fixture(scope="module")
def server(tokenizer):
    with running(deepcopy(tokenizer), max_body_bytes=LIMIT, max_choices=4) as found:
        yield found


@pytest.fixture(autouse=True)
def _still_well(server):
    """After each of these a good request has its answer, and nothing is left behind."""
    yield
    status, answer = server.complete(prompt="a", max_tokens=2)
    assert status == 200 and answer["usage"]["completion_tokens"] == 2
    wait_for(lambda: not (server.engine.running or server.engine.waiting), "an idle engine", 2)


def refused(server, path, body, headers=None):
    before = len(server.engine.submitted)
    status, found, document = server.request("POST", path, body, headers)
    assert len(server.engine.submitted) == before, "the engine was asked"
    assert found["content-type"] == "application/json"
    assert document.keys() == {"error"}
    assert document["error"].keys() == {"message", "type", "param", "code"}
    assert "\n" not in document["error"]["message"]
    return status, document["error"]


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b"", "the body is empty", "invalid_json"),
        (b"{", "not valid JSON", "invalid_json"),
        (b'{"prompt": "a"', "not valid JSON", "invalid_json"),
        (b'{"prompt": "a"}}', "not valid JSON", "invalid_json"),
        (b"\xff\xfe", "", None),
        (b"[]", "must be a JSON object", "invalid_json"),
        (b'"prompt"', "must be a JSON object", "invalid_json"),
        (b"null", "", "invalid_json"),
        (b"[" * 4000, "parsing the body", None),
        (b'{"a":' * 800, "", None),
        (b'{"prompt": "a", "seed": ' + b"9" * 4010 + b"}", "seed", "invalid_value"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_malformed_bodies(server, body, message, code):
    status, error = refused(server, "/v1/completions", body)
    assert status == 400 and message in error["message"]
    if code:
        assert error["code"] == code
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt is required"),
        ({"prompt": []}, "prompt", "not empty"),
        ({"prompt": [[]]}, "prompt", "must be a string"),
        ({"prompt": [1, "a"]}, "prompt", "must be a string"),
        ({"prompt": [True]}, "prompt", "must be a string"),
        ({"prompt": [1.5]}, "prompt", "must be a string"),
        ({"prompt": {"a": 1}}, "prompt", "must be a string"),
        ({"prompt": ""}, None, "the prompt is empty"),
        ({"prompt": [300]}, None, "token ids that the model does not have"),
        ({"prompt": [-1]}, None, "token ids that the model does not have"),
        ({"prompt": [10**30]}, None, "token ids that the model does not have"),
        ({"prompt": [10**30], "echo": True}, None, "token ids that the model does not have"),
        ({"prompt": b'"\\ud800"'}, "prompt", "surrogate"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": -5}, "max_tokens", "at least 1"),
        ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
        ({"max_tokens": "16"}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": b"NaN"}, "temperature", "finite"),
        ({"temperature": b"Infinity"}, "temperature", "finite"),
        ({"temperature": b"-Infinity"}, "temperature", "finite"),
        ({"temperature": b"1e999"}, "temperature", "finite"),
        ({"temperature": -0.1}, "temperature", "0 or more"),
        ({"temperature": "hot"}, "temperature", "valid number, got 'hot'"),
        ({"top_p": 0}, "top_p", "above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p", "above 0 and at most 1"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 1.5}, "min_p", "between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"repetition_penalty": -1}, "repetition_penalty", "above 0"),
        ({"seed": -1}, "seed", "between 0"),
        ({"seed": 2**63}, "seed", "between 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 5}, "n", "at most 4"),
        ({"n": 2, "prompt": ["a", "b", "c"]}, "n", "is 6; at most 4"),
        ({"stop": [""]}, "stop", "none empty"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": 1}, "stop", "valid string"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"logprobs": 1, "echo": True}, "logprobs", "not supported"),
        ({"model": 3}, "model", "valid string"),
        ({"temprature": 1}, "temprature", "unknown field 'temprature'"),
        ({"messages": HI}, "messages", "unknown field"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_fields_of_a_completion(server, fields, param, message):
    values = {"prompt": "a", **fields}
    raw = [
        b'"%s": %s' % (name.encode(), value if isinstance(value, bytes) else _json(value))
        for name, value in values.items()
    ]
    # the fake engine, as the interface says, refuses unknown ids itself
    status, error = refused(server, "/v1/completions", b"{" + b", ".join(raw) + b"}")
    assert (status, error["param"]) == (400, param)
    assert message in error["message"]


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"logit_bias": {"50": -100}},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -1},
        {"reasoning_effort": "high"},
        {"modalities": ["audio"]},
        {"min_tokens": 3},
        {"structured_outputs": {"regex": "a"}},
        {"use_beam_search": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_unsupported_fields_that_would_change_the_text(server, fields):
    status, error = refused(server, "/v1/chat/completions", {"messages": HI, **fields})
    assert (status, error["code"]) == (400, "unsupported_field")
    assert error["param"] == next(iter(fields))


@pytest.mark.parametrize("fields", [{"best_of": 2}, {"suffix": "end"}], ids=str)
def test_unsupported_fields_of_a_completion(server, fields):
    status, error = refused(server, "/v1/completions", {"prompt": "a", **fields})
    assert (status, error["code"]) == (400, "unsupported_field")


def test_fields_that_say_off_or_change_nothing_are_taken(server):
    off = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "use_beam_search": False,
        "user": "u",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "top_p": None,
    }
    body = {"messages": HI, "max_tokens": 2}
    plain = server.request("POST", "/v1/chat/completions", body)[2]
    found = server.request("POST", "/v1/chat/completions", {**body, **off})[2]
    assert found["choices"] == plain["choices"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"messages": [*HI, {"role": "system", "content": "x"}]}, "system message comes first"),
        ({"messages": HI, "max_tokens": 1, "max_completion_tokens": 2}, "differ"),
        ({"messages": HI, "top_logprobs": 2}, "logprobs is true"),
        ({"prompt": "a"}, "messages is required"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_bad_chats(server, fields, message):
    status, error = refused(server, "/v1/chat/completions", fields)
    assert status == 400 and message in error["message"]


def test_too_long_for_the_model(server):
    status, error = refused(server, "/v1/completions", {"prompt": "a", "max_tokens": 512})
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 512 tokens" in error["message"]
    # the default number of tokens shrinks to what is left, but not below one
    status, answer = server.complete(prompt=[5] * 510)
    assert status == 200 and answer["usage"]["completion_tokens"] == 2
    status, error = refused(server, "/v1/completions", {"prompt": [5] * 512})
    assert (status, error["code"]) == (400, "context_length_exceeded")
    chat = {"messages": [{"role": "user", "content": "~!" * 300}]}
    status, error = refused(server, "/v1/chat/completions", chat)
    assert (status, error["code"]) == (400, "context_length_exceeded")


def test_unknown_model_route_method_and_type(server):
    status, error = refused(server, "/v1/completions", {"prompt": "a", "model": "gpt"})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert refused(server, "/v1/embeddings", {})[0] == 404
    assert server.request("GET", "/v1/completions")[0] == 405
    for kind in ({}, {"Content-Type": "text/plain"}):
        assert refused(server, "/v1/completions", b'{"prompt": "a"}', kind)[0] == 415


def test_huge_bodies_are_refused_unread(server):
    # 10 GB announced, none sent: the answer does not wait for them
    with server.connect() as connection:
        connection.sendall(post_bytes(b"", length=10**10))
        answer = read_all(connection)
    assert b" 413 " in answer.split(b"\r\n")[0] and b"body_too_large" in answer
    assert b"connection: close" in answer
    # of unknown length: cut off at the limit, long before the end
    with server.connect() as connection:
        connection.sendall(post_bytes(b"", "Transfer-Encoding: chunked"))
        sent = 0
        try:
            for _ in range(10_000):
                connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
                sent += 1024
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 10_000 * 1024
    status, _ = server.complete(prompt="a" * (LIMIT - 200))
    assert status == 400  # read in full: too long for the model, not for the server


def test_expect_100_continue_is_refused_before_the_body(server):
    with server.connect() as connection:
        connection.sendall(post_bytes(b"", "Expect: 100-continue", length=10**6))
        assert b" 413 " in read_all(connection).split(b"\r\n")[0]


def test_lengths_that_lie(server):
    with server.connect() as connection:
        connection.sendall(post_bytes(b"{}", "Content-Length: 5"))
        assert b" 400 " in read_all(connection).split(b"\r\n")[0]
    for length in ("-1", "abc", "1e3"):
        with server.connect() as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}"
                "\r\n\r\n".encode()
            )
            assert b" 400 " in read_all(connection).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 4 + b"\r\n\r\n",  # TLS
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n",
    ],
    ids=["words", "no-host", "tls", "long-header", "bad-header"],
)
def test_what_is_no_http(server, raw):
    with server.connect() as connection:
        connection.sendall(raw)
        answer = read_all(connection)
    assert b" 400 " in answer.split(b"\r\n")[0] and b'"code":"invalid_http"' in answer


def test_other_names_of_this_machine_are_refused(server):
    status, _, document = server.request("GET", "/v1/models", headers={"Host": "evil.example"})
    assert (status, document["error"]["code"]) == (403, "wrong_host")
    for host in ("localhost", "127.0.0.1:9", "[::1]:8000", "LOCALHOST"):
        assert server.request("GET", "/v1/models", headers={"Host": host})[0] == 200


def test_no_header_for_other_sites(server):
    headers = {**JSON, "Origin": "https://evil.example"}
    _, found, _ = server.request("POST", "/v1/completions", {"prompt": "a"}, headers)
    assert not [name for name in found if name.startswith("access-control")]
    assert server.request("OPTIONS", "/v1/completions", headers=headers)[0] == 405


def test_chat_without_a_template(tokenizer):
    with running(deepcopy(tokenizer), chat=False) as plain:
        status, error = refused(plain, "/v1/chat/completions", {"messages": HI})
        assert (status, error["code"]) == (400, "no_chat_template")
        assert "/v1/completions" in error["message"]
        models = plain.request("GET", "/v1/models")[2]
        assert models["data"][0]["has_chat_template"] is False


def test_api_keys(tokenizer):
    keys = ["k" * 20, "second-key-of-these-two"]
    with running(deepcopy(tokenizer), keys=keys) as locked:
        for value in (None, "Bearer wrong", "Bearer ", "Basic " + keys[0], keys[0], "Bearer \xe9"):
            headers = JSON if value is None else {**JSON, "Authorization": value}
            status, error = refused(locked, "/v1/completions", {"prompt": "a"}, headers)
            assert (status, error["code"]) == (401, "invalid_api_key")
            assert keys[0] not in error["message"]
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            assert locked.request("GET", path)[0] == 401
        for path in ("/", "/health"):
            assert locked.request("GET", path)[0] == 200
        for key in keys:
            headers = {**JSON, "Authorization": f"Bearer {key}"}
            assert locked.request("POST", "/v1/completions", {"prompt": "a"}, headers)[0] == 200
        # before a body is read, and under any name: the key is what counts
        with locked.connect() as connection:
            connection.sendall(post_bytes(b"", length=10**10))
            assert b" 401 " in read_all(connection).split(b"\r\n")[0]
        headers = {"Host": "my.example", "Authorization": f"Bearer {keys[0]}"}
        assert locked.request("GET", "/v1/models", headers=headers)[0] == 200
