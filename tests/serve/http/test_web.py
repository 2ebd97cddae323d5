"""The page at /: what it is made of, and what a person does with it in a real browser."""

import base64
import hashlib
import re
from copy import deepcopy
from html.parser import HTMLParser
from importlib.resources import files

import pytest

pytest.importorskip("fastapi", reason="needs lillama[serve]")

from tests.serve.http.running import running, wait_for  # noqa: E402
from tests.webdriver import (  # noqa: E402
    CHROMEDRIVER,
    CHROMIUM,
    CONTROL,
    ENTER,
    ESCAPE,
    TAB,
    Browser,
)

needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="no Chromium with chromedriver (Debian: apt-get install chromium chromium-driver)",
)


def in_a_browser(test):
    return pytest.mark.full(needs_chromium(test))


PAGE = files("lillama.serve.http").joinpath("web.html").read_text("utf-8")
KEY = "a-key-of-twenty-signs"
# A step takes 20 ms on average, so 60 tokens about a second.
STEP_S = 0.02


@pytest.fixture(scope="module")
def server(tokenizer):
    with running(deepcopy(tokenizer), step_s=STEP_S) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    found = Browser("--window-size=800,900")
    yield found
    found.close()


@pytest.fixture
def page(browser, server):
    browser.log("browser")
    browser.open(server.url)
    browser.wait(lambda: "tiny, chat, up to 512 tokens" in browser.text("#about"), "the model")
    yield browser
    wait_for(lambda: not server.engine.running, "an idle engine")


def is_done(page) -> bool:
    return page.run("return document.getElementById('stop').disabled")


def fill(page, css: str, text: str) -> None:
    page.run("document.querySelector(arguments[0]).value = arguments[1]", css, text)


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_is_one_file_that_its_policy_allows_and_nothing_else(server):
    status, headers, body = server.request("GET", "/")
    assert status == 200 and body.decode() == PAGE
    assert headers["content-type"] == "text/html; charset=utf-8"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?:|//\w|@import|url\(|\bon\w+=|style=", PAGE.replace("</", ""))


def test_page_labels_every_field():
    parser = _Elements()
    parser.feed(PAGE)
    labelled = {attrs["for"] for tag, attrs in parser.found if tag == "label"}
    fields = {attrs["id"] for tag, attrs in parser.found if tag in ("input", "textarea")}
    assert fields == labelled and len(fields) == 11


@in_a_browser
def test_page_streams_a_chat(page, server):
    page.type("#prompt", "hello" + CONTROL + ENTER)
    first = page.wait(lambda: page.text("#output .model"), "the first words")
    page.wait(lambda: len(page.text("#output .model")) > len(first), "more words")
    assert not is_done(page) and page.run("return document.querySelector('#output').ariaBusy")
    page.wait(lambda: is_done(page), "the end")
    answer = page.run("return document.querySelector('#output .model span:last-child').textContent")
    words = server.engine.words
    total = sum(server.engine.submitted[-1].prompt)
    wanted = "".join(words[(total + i) % len(words)][1] for i in range(128))
    assert answer == wanted.strip()
    figures = page.text("#figures")
    assert re.search(r"first token \d+ ms, 128 tokens, [\d.]+ tokens/s, cut at", figures)
    rate = float(re.search(r"([\d.]+) tokens/s", figures)[1])
    assert 0.4 / STEP_S < rate < 2 / STEP_S
    # a screen reader hears the whole answer once, not every token
    assert page.run("return document.getElementById('spoken').textContent").strip() == answer
    # the next turn has the first before it
    fill(page, "#max_tokens", "3")
    page.type("#prompt", "more" + CONTROL + ENTER)
    page.wait(lambda: page.run("return document.querySelectorAll('.model').length") == 2, "turn 2")
    page.wait(lambda: is_done(page), "the end")
    chat = f"user: hello\nassistant: {wanted}\nuser: more\nassistant:"
    assert server.engine.submitted[-1].prompt == _ids(server, chat)
    assert page.log("browser") == []


def _ids(server, text: str) -> list[int]:
    return server.tokenizer(text)["input_ids"]


@in_a_browser
@pytest.mark.parametrize("way", ["button", "key"])
def test_page_stops(page, server, way):
    before = server.engine.finished.get("cancelled", 0)
    page.type("#prompt", "hello")
    page.click("#send")
    page.wait(lambda: page.text("#output .model"), "the first words")
    if way == "button":
        page.click("#stop")
    else:
        page.type("#prompt", ESCAPE)
    page.wait(lambda: is_done(page), "the end", 5)
    assert "stopped" in page.text("#figures")
    wait_for(lambda: server.engine.finished.get("cancelled", 0) == before + 1, "cancellation", 5)


@in_a_browser
def test_page_shows_errors_and_keeps_what_was_typed(page):
    fill(page, "#temperature", "-1")
    page.type("#prompt", "hello" + CONTROL + ENTER)
    page.wait(lambda: page.text("#error"), "the error")
    assert page.text("#error") == "temperature is -1.0; it must be 0 or more"
    assert page.role("#error")[0] == "alert"
    assert page.run("return document.getElementById('prompt').value") == "hello"
    fill(page, "#temperature", "0.5")
    page.type("#prompt", "^" + CONTROL + ENTER)
    page.wait(lambda: "no such luck" in page.text("#error"), "the engine's error")
    fill(page, "#prompt", "bye~")
    page.click("#send")
    page.wait(lambda: "imaginary memory" in page.text("#error"), "an error in the stream")
    assert page.text("#output .model")  # what came before it stays
    fill(page, "#prompt", "again")
    fill(page, "#max_tokens", "2")
    page.click("#send")
    page.wait(lambda: not page.text("#error") and is_done(page), "an answer after errors")


@in_a_browser
def test_page_sends_what_its_fields_say(page, server):
    numbers = {"max_tokens": 4, "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125}
    numbers |= {"repetition_penalty": 1.5, "seed": 11}
    for name, value in numbers.items():
        fill(page, f"#{name}", str(value))
    fill(page, "#stop_text", "zebra\nyak")
    fill(page, "#system", "be kind")
    page.type("#prompt", "hello" + CONTROL + ENTER)
    page.wait(lambda: "cut at" in page.text("#figures"), "the end")
    asked = server.engine.submitted[-1]
    assert asked.params.max_new_tokens == numbers.pop("max_tokens")
    assert {name: getattr(asked.params, name) for name in numbers} == numbers
    assert asked.params.stop == ("zebra", "yak")
    assert asked.prompt == _ids(server, "system: be kind\nuser: hello\nassistant:")


@in_a_browser
def test_page_works_by_keyboard_and_screen_reader(page):
    page.run("document.querySelector('details').open = true")
    names = {}
    fields = "return [...document.querySelectorAll('input,textarea,button')].map((e) => '#' + e.id)"
    for css in page.run(fields):
        if not page.run("return document.querySelector(arguments[0]).checkVisibility()", css):
            continue
        role, names[css] = page.role(css)
        assert role in ("textbox", "spinbutton", "button") and names[css], css
    assert names["#prompt"] == "Message" and names["#temperature"] == "Temperature (0: greedy)"
    assert len(set(names.values())) == len(names) == 13
    page.type("#prompt", "hi" + TAB)
    assert page.run("return document.activeElement.id") == "send"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.run(outline) == "solid"
    assert page.role("#spoken")[0] == "status" and page.role("#output")[0] == "log"


@in_a_browser
def test_page_fits_a_phone_and_darkness(page):
    command = f"{page.session}/goog/cdp/execute"

    def emulate(name: str, **params: object) -> None:
        page.call("POST", command, {"cmd": f"Emulation.{name}", "params": params})

    colour = "return getComputedStyle(document.body).backgroundColor"
    light = page.run(colour)
    emulate("setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=2, mobile=True)
    emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    try:
        page.run("document.querySelector('details').open = true")
        fill(page, "#max_tokens", "5")
        page.type("#prompt", "hello" + "x" * 200 + CONTROL + ENTER)
        page.wait(lambda: "cut at" in page.text("#figures"), "the end")
        assert page.run("return document.documentElement.scrollWidth <= 320")
        sizes = "return [...document.querySelectorAll('button')].map((b) => b.offsetHeight)"
        assert min(page.run(sizes)) >= 44
        dark = page.run(colour)
        assert dark != light
        assert all(int(part) < 64 for part in re.findall(r"\d+", dark))
    finally:
        emulate("clearDeviceMetricsOverride")
        emulate("setEmulatedMedia", features=[])


@in_a_browser
def test_page_asks_nobody_else(page, server):
    page.log("performance")
    page.open(server.url)
    page.wait(lambda: "tiny" in page.text("#about"), "the model")
    addresses = re.findall(
        r'"Network.requestWillBeSent".*?"url":"([^"]+)"',
        "\n".join(entry["message"] for entry in page.log("performance")),
    )
    assert addresses and {a for a in addresses if not a.startswith(server.url)} <= {"data:,"}


@in_a_browser
def test_page_continues_text_where_there_is_no_template(browser, tokenizer):
    with running(deepcopy(tokenizer), chat=False) as plain:
        browser.open(plain.url)
        browser.wait(lambda: "tiny, completion" in browser.text("#about"), "the model")
        assert browser.text("#prompt-label") == "Text to continue"
        fill(browser, "#max_tokens", "3")
        browser.type("#prompt", "the cat" + CONTROL + ENTER)
        browser.wait(lambda: "cut at" in browser.text("#figures"), "the end")
        words = plain.engine.words
        total = sum(plain.engine.submitted[-1].prompt)
        text = "".join(words[(total + i) % len(words)][1] for i in range(3))
        assert browser.text("#output") == "the cat" + text
        assert browser.text("#output strong") == text


@in_a_browser
def test_page_asks_for_a_key(browser, tokenizer):
    with running(deepcopy(tokenizer), keys=[KEY]) as locked:
        browser.open(locked.url)
        browser.wait(lambda: "no API key" in browser.text("#error"), "the refusal")
        browser.type("#key", "wrong" + TAB)
        browser.wait(lambda: "wrong API key" in browser.text("#error"), "the second refusal")
        fill(browser, "#key", "")
        browser.type("#key", KEY + TAB)
        browser.wait(lambda: "tiny, chat" in browser.text("#about"), "the model")
        assert browser.text("#error") == ""
        fill(browser, "#max_tokens", "3")
        browser.type("#prompt", "hi" + CONTROL + ENTER)
        browser.wait(lambda: "cut at" in browser.text("#figures"), "an answer")


@in_a_browser
def test_page_says_that_the_server_is_gone(browser, tokenizer):
    with running(deepcopy(tokenizer)) as ending:
        browser.open(ending.url)
        browser.wait(lambda: "tiny" in browser.text("#about"), "the model")
    browser.type("#prompt", "hi" + CONTROL + ENTER)
    browser.wait(lambda: "cannot be reached" in browser.text("#error"), "the error")
