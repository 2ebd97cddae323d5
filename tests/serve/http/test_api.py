"""OpenAI's own client and curl against a real server over the fake engine."""

import json
import shutil
import subprocess
from copy import deepcopy

import pytest

pytest.importorskip("fastapi", reason="needs lillama[serve]")
openai = pytest.importorskip("openai")

from tests.serve.http.running import Running, running  # noqa: E402

WORDS = " cat sat on the mat while old dogs ran"


@pytest.fixture(scope="module")
def server(tokenizer):
    with running(deepcopy(tokenizer)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


def expected(server: Running, prompt_ids: list[int], count: int, seed: int = 0) -> str:
    words = server.engine.words
    return "".join(words[(sum(prompt_ids) + seed + i) % len(words)][1] for i in range(count))


def test_completion_is_the_engines_text(server, client, tokenizer):
    answer = client.completions.create(model="tiny", prompt="the cat", max_tokens=5)
    ids = tokenizer("the cat")["input_ids"]
    assert answer.choices[0].text == expected(server, ids, 5)
    assert answer.choices[0].finish_reason == "length" and answer.object == "text_completion"
    assert answer.usage.prompt_tokens == len(ids)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (5, len(ids) + 5)


def test_completion_of_ids_lists_and_n(server, client, tokenizer):
    text = client.completions.create(model="tiny", prompt=[7, 8], max_tokens=3)
    assert text.choices[0].text == expected(server, [7, 8], 3)
    both = client.completions.create(
        model="tiny", prompt=[[7, 8], [9]], n=2, seed=5, max_tokens=3, echo=True
    )
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    wanted = [
        tokenizer.decode(ids) + expected(server, ids, 3, seed)
        for ids in ([7, 8], [9])
        for seed in (5, 6)
    ]
    assert [choice.text for choice in both.choices] == wanted
    # a prompt is read once, however many answers it has
    assert both.usage.prompt_tokens == 3 and both.usage.completion_tokens == 12
    strings = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=2, echo=True)
    assert [choice.text[0] for choice in strings.choices] == ["a", "b"]


def test_completion_defaults_to_16_tokens(client):
    assert client.completions.create(model="tiny", prompt="a").usage.completion_tokens == 16


def test_completion_end_stop_and_ignore_eos(client):
    answer = client.completions.create(model="tiny", prompt="a$", max_tokens=9)
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens == 5
    answer = client.completions.create(
        model="tiny", prompt="a$", max_tokens=9, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 9
    answer = client.completions.create(model="tiny", prompt="a", max_tokens=50, stop=["dogs"])
    assert answer.choices[0].finish_reason == "stop" and "dogs" not in answer.choices[0].text


def test_sampling_fields_reach_the_engine(server, client):
    client.completions.create(
        model="tiny",
        prompt="a",
        max_tokens=2,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop="x",
        user="somebody",
        extra_body={"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2, "best_of": 1},
    )
    params = server.engine.submitted[-1].params
    assert (params.max_new_tokens, params.temperature, params.top_p) == (2, 0.5, 0.9)
    assert (params.seed, params.stop, params.top_k) == (3, ("x",), 0)
    assert (params.min_p, params.repetition_penalty, params.logprobs) == (0.1, 1.2, None)
    client.completions.create(model="tiny", prompt="a")
    defaults = server.engine.submitted[-1].params
    assert (defaults.temperature, defaults.top_p, defaults.seed) == (1.0, 1.0, None)


def test_completion_logprobs(client, tokenizer):
    answer = client.completions.create(model="tiny", prompt="a", max_tokens=3, logprobs=2)
    found = answer.choices[0].logprobs
    assert found.token_logprobs == [-0.5, -1.0, -1.5]
    assert [len(top) for top in found.top_logprobs] == [2, 2, 2]
    assert [top[token] for token, top in zip(found.tokens, found.top_logprobs, strict=True)] == [
        -0.5,
        -1.0,
        -1.5,
    ]
    lengths = [len(token) for token in found.tokens]
    assert found.text_offset == [0, lengths[0], lengths[0] + lengths[1]]
    chunks = client.completions.create(
        model="tiny", prompt="a", max_tokens=3, logprobs=2, stream=True
    )
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for part in parts for token in part.tokens] == found.tokens
    assert [offset for part in parts for offset in part.text_offset] == found.text_offset


def test_completion_stream_says_the_same_and_the_usage(client):
    whole = client.completions.create(model="tiny", prompt="a", max_tokens=7)
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt="a",
            max_tokens=7,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_completion_stream_of_several_choices(client):
    whole = client.completions.create(model="tiny", prompt=["a", "b$"], max_tokens=7, n=2, seed=1)
    texts, reasons = [""] * 4, [None] * 4
    for chunk in client.completions.create(
        model="tiny", prompt=["a", "b$"], max_tokens=7, n=2, seed=1, stream=True
    ):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["length", "length", "stop", "stop"]


def test_chat_runs_the_template(server, client, tokenizer):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, *_text("cat")]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    ids = tokenizer("system: be brief\nuser: the cat\nassistant:")["input_ids"]
    assert server.engine.submitted[-1].prompt == ids
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", expected(server, ids, 4))
    assert answer.object == "chat.completion" and answer.usage.prompt_tokens == len(ids)


def _text(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def test_chat_stream_begins_with_the_role(client):
    messages = [{"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=5)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=5, stream=True
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_may_use_what_is_left_of_the_length(client, server):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}]
    )
    assert answer.usage.total_tokens == server.engine.max_length


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=2,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == [-0.5, -1.0]
    assert bytes(content[0].bytes).decode() == content[0].token
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5, -2.5]


def test_models_lists_the_one(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert models[0].max_model_len == 512 and models[0].has_chat_template is True


def test_client_gets_its_own_exceptions(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.InternalServerError, match="no such luck"):
        client.completions.create(model="tiny", prompt="a^")
    stream = client.completions.create(model="tiny", prompt="a~", stream=True)
    with pytest.raises(openai.APIError, match="out of imaginary memory"):
        list(stream)


def test_openapi_document_names_the_fields(server):
    status, _, document = server.request("GET", "/openapi.json")
    schemas = document["components"]["schemas"]
    assert (
        status == 200 and {"prompt", "min_p"} <= schemas["CompletionRequest"]["properties"].keys()
    )


def test_metrics_count_what_happened(server):
    before = server.metric("lillama_generated_tokens_total")
    server.complete(prompt="a", max_tokens=6)
    assert server.metric("lillama_generated_tokens_total") == before + 6
    assert server.metric('lillama_choices_total{reason="length"}') > 0
    assert server.metric("lillama_time_to_first_token_seconds_count") > 0
    assert server.metric("lillama_time_per_output_token_seconds_count") > 0
    name = 'lillama_http_requests_total{route="/v1/completions",status="200"}'
    assert server.metric(name) > 0 and server.metric("lillama_running") == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_a_stream(server):
    body = {"prompt": "a", "max_tokens": 3, "stream": True}
    command = ["curl", "-sSN", "--fail", server.url + "/v1/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-2]]
    assert "".join(texts) == server.complete(prompt="a", max_tokens=3)[1]["choices"][0]["text"]
