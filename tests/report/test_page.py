"""The report: every figure on the page, nothing that a browser would fetch, errors in one line."""

import json
import re
import shlex
import sys
import webbrowser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs lillama[report]")

import lillama  # noqa: E402
from lillama.cli import app as cli
from lillama.errors import InputError, RunError  # noqa: E402
from lillama.report.sections import format_number  # noqa: E402
from tests.report.html_page import Page  # noqa: E402
from tests.webdriver import CHROMEDRIVER, CHROMIUM, Browser  # noqa: E402

SCRIPT = "<script>alert(1)</script>"
PLOTS = {"sizes", "ranks", "spectra", "held-out-loss", "loss-curves", "experts", "time-memory"}


def cells(table: list[list[str]]) -> set[str]:
    return {cell for row in table for cell in row}


def command_line(monkeypatch, *words: object) -> object:
    monkeypatch.setattr(sys, "argv", ["lillama", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


# What is on it
def test_report_has_every_figure_of_its_files(run):
    page, report = run.page, run.report
    quality = json.loads(run.eval.read_text("utf-8"))
    sizes = page.tables["Parameters by layer"]
    totals = [report["params_before"], report["params_after"]]
    assert sizes[-1] == ["whole model", *(f"{total:,}" for total in totals)]
    columns = list(zip(*sizes[1:-1], strict=True))[1:]
    assert [sum(int(x.replace(",", "")) for x in column) for column in columns] == totals
    losses, costs = page.tables["Held-out loss by block"], page.tables["Time and peak memory"]
    assert len(losses) == len(report["blocks"]) + 1 > 2
    for row in report["blocks"]:
        for table, keys in (
            (losses, ("held_out_loss_before", "held_out_loss_after", "steps", "best_step")),
            (costs, ("seconds", "peak_memory_bytes")),
        ):
            (line,) = [line for line in table[1:] if line[0] == str(row["index"])]
            assert line[1:] == [format_number(row[key]) for key in keys]
    found = cells(page.tables["Quality on the text that eval was given"])
    assert {format_number(v) for k, v in quality.items() if isinstance(v, float)} <= found
    text = " ".join(" ".join(parts) for parts in page.texts.values())
    for value in (report["predicted_loss_increase"], report["tokens"], report["seconds"]):
        assert format_number(value) in text
    assert f"{quality['retained']:.2%}" in text and f"{quality['tokens']:,}" in text


@pytest.mark.parametrize("name", ["run", "plain"])
def test_report_lists_every_rank_with_its_break_even(name, request):
    run = request.getfixturevalue(name)
    config = json.loads((run.out / "config.json").read_text("utf-8"))["quantization_config"]
    table = run.page.tables["Rank of each target matrix"][1:]
    ranks = sorted(int(line[2]) for line in table if line[2] != "dense")
    assert ranks == sorted(config["ranks"].values()) and ranks
    for _name, shape, rank, break_even, before, after in table:
        N, K = (int(side) for side in shape.split(" x "))
        assert int(before.replace(",", "")) == N * K
        if rank == "dense":
            assert after == before
            continue
        assert int(rank) <= int(break_even)
        numbers = int(rank) * (N + K - int(rank) * (config["gauge"] == "pivot"))
        assert after == f"{numbers:,}" and numbers < N * K


def test_report_draws_the_losses_of_the_events(run):
    table = run.page.tables["Held-out loss while training"][1:]
    judged = [json.loads(line) for line in run.events.read_text("utf-8").splitlines()]
    wanted = {
        (str(e["block"]), str(e["step"]), format_number(e["held_out_loss"]))
        for e in judged
        if e["event"] == "judged"
    }
    assert {tuple(line) for line in table} == wanted and len(wanted) > 4


def test_report_tells_of_experts(run, plain):
    table = run.page.tables["Calibration tokens by expert"]
    for line, row in zip(table[1:], run.report["blocks"], strict=True):
        assert line[1:-1] == [f"{tokens:,}" for tokens in row["expert_tokens"]]
        assert line[-1] == (", ".join(map(str, row["starved_experts"])) or "none")
    assert "Calibration tokens by expert" not in plain.page.tables


def test_report_without_events_and_eval_says_how_to_get_them(plain):
    page = plain.page
    assert "give the events file of the run with --events" in " ".join(page.texts["p"])
    assert "--eval eval.json" in page.texts["code"]
    assert "Held-out loss while training" not in page.tables


def test_report_command_makes_the_same_model_again(plain, tmp_path, monkeypatch):
    command = plain.page.texts["code"][-1]
    words = shlex.split(command)
    assert words[:4] == ["lillama", "compress", str(plain.model), str(plain.out)]
    again = tmp_path / "again"
    assert command_line(monkeypatch, *words[1:3], again, *words[4:]) == 0
    options = [
        json.loads((out / "recipe.json").read_text())["options"] for out in (plain.out, again)
    ]
    assert options[0] == options[1]
    for file in plain.out.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


# How it is made
def test_report_is_one_file_that_fetches_and_runs_nothing(run):
    text, page = run.html, run.page
    assert not re.search(r"https?:|//\w|@import|\bon\w+=|javascript:|xmlns", text)
    assert all(target.startswith("(#") for target in re.findall(r"url(\([^)]*)", text))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "image", "iframe", "object", "embed", "form"}
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'")
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {a["href"] for _, a in page.elements if "href" in a}
    targets |= {f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", text)}
    assert targets <= {f"#{name}" for name in ids} and targets


def test_report_can_be_read_aloud_and_on_a_phone(run):
    page = run.page
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )
    assert "prefers-color-scheme:dark" in page.texts["style"][0]
    headings = [tag for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert headings[0] == "h1" and set(headings[1:]) == {"h2"}
    plots = page.all("svg")
    assert len(plots) == len(page.texts["title"]) - 1 == len(PLOTS)
    for plot in plots:
        assert plot["role"] == "img" and "width" not in plot
        title, description = (plot["aria-labelledby"] or "").split()
        assert {"id": title} in page.all("title") and {"id": description} in page.all("desc")
    assert page.all("table") and len(page.all("table")) == len(page.all("caption"))
    for table in page.tables.values():
        assert len({len(row) for row in table}) == 1 and len(table) > 1
    assert {a["scope"] for a in page.all("th")} == {"col", "row"}
    # letters take the page's colour, dark or light
    assert "fill: currentColor" in run.html and "#010203" not in run.html


def test_report_escapes_every_text_of_its_files(plain, tmp_path):
    assert "<b>" not in plain.html and "&lt;b&gt;&amp;&#x27;&quot; base" in plain.html
    run = plain.copy(tmp_path, device=SCRIPT)
    recipe = json.loads((run.out / "recipe.json").read_text("utf-8"))
    options = recipe["options"] | {"model": SCRIPT, "text": [SCRIPT, "\ud800"], "loss": SCRIPT}
    options |= {"preset": SCRIPT, "dtype": SCRIPT, "strategy": SCRIPT}
    run.edit(
        "recipe.json", options=options, versions={SCRIPT: SCRIPT}, device=SCRIPT,
        model_sha256=SCRIPT, data_sha256={SCRIPT: SCRIPT},
    )  # fmt: skip
    evil = run.out.rename(tmp_path / "<script>x")
    assert lillama.report(evil) == [evil / "report.html"]
    text = (evil / "report.html").read_text("utf-8")
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 10
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.texts["h1"][0].startswith("<script>x: ")


def test_report_command_prints_what_it_wrote_the_same_twice(run, monkeypatch, capfd, tmp_path):
    folder = tmp_path / "plots"
    options = ("--events", run.events, "--eval", run.eval, "--png", folder)
    assert command_line(monkeypatch, "report", run.out, *options) == 0
    out, err = capfd.readouterr()
    page, *plots = map(Path, out.splitlines())
    assert err == "" and page == run.out / "report.html" and page.read_text("utf-8") == run.html
    assert {file.stem for file in plots} == PLOTS and sorted(folder.iterdir()) == sorted(plots)
    for file in plots:
        data = file.read_bytes()
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        assert data.startswith(b"\x89PNG") and width > 900 and height > 250


def test_report_open_shows_the_page(plain, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    lillama.report(plain.out, open=True)
    assert opened == [(plain.out / "report.html").as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    with pytest.raises(RunError, match="no browser was found"):
        lillama.report(plain.out, open=True)


# What it refuses
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("report.json", {"params_after": 5}, "they are not of the same run"),
        ("report.json", {"seconds": float("nan")}, "seconds must be a finite number, got nan"),
        ("report.json", {"seconds": None}, "seconds must be a finite number, got None"),
        ("report.json", {"blocks": [{}]}, r"blocks\[0\].index must be a finite number, got None"),
        ("report.json", {"blocks": 3}, "blocks must be a list"),
        ("report.json", {"head": {"held_out_kl_before": 1.0}}, "head.held_out_kl_after must be"),
        ("report.json", {"finetune": 3}, "finetune must be an object, got 3"),
        ("report.json", {"rank_losses": [1]}, r"rank_losses must be an object, got \[1\]"),
        ("report.json", {"rank_losses": {"w9": {"8": 1.0}}}, "has w9, no target of the run in"),
        ("report.json", {"rank_losses": {"x": 3}}, "rank_losses.x must be an object"),
        ("report.json", {"rank_losses": {"x": {"8": "1"}}}, "rank_losses.x.8 must be a finite"),
        ("report.json", {"rank_losses": {"x": {"y": 1}}}, "x must have numbers as names, got 'y'"),
        ("recipe.json", {"options": {}}, "options.preset_values must be an object, got None"),
        ("config.json", {"quantization_config": None}, "is a dense model"),
    ],
)
def test_report_damaged_files_are_refused(name, changes, message, plain, tmp_path):
    run = plain.copy(tmp_path)
    run.edit(name, **changes)
    with pytest.raises(InputError, match=message):
        lillama.report(run.out)
    assert not (run.out / "report.html").exists()


@pytest.mark.parametrize("name", ["report.json", "recipe.json"])
def test_report_missing_files_are_named(name, plain, tmp_path):
    run = plain.copy(tmp_path)
    (run.out / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing; `lillama compress` writes it"):
        lillama.report(run.out)
    (run.out / name).write_text("[1]")
    with pytest.raises(InputError, match=f"{name} must be an object, got"):
        lillama.report(run.out)
    (run.out / name).write_text("{")
    with pytest.raises(InputError, match=f"{name} cannot be read as JSON"):
        lillama.report(run.out)


def test_report_events_of_another_run_are_refused(run, plain):
    with pytest.raises(InputError, match="is of another run: there block"):
        lillama.report(plain.out, events=run.events)
    with pytest.raises(InputError, match="is about another model: it has"):
        lillama.report(plain.out, eval=run.eval)
    with pytest.raises(InputError, match="tells of no finished block"):
        lillama.report(run.out, events=run.eval)


def test_report_events_of_several_runs_end_with_the_last(run, tmp_path):
    both = tmp_path / "both.jsonl"
    other = [{"event": "judged", "block": 0, "step": 777, "held_out_loss": 5.0}]
    other += [{"event": "block", "index": 0, "held_out_loss_after": 5.0}, {"event": "finished"}]
    lines = [json.dumps(event) for event in other]
    both.write_text("\n".join([*lines, run.events.read_text("utf-8")]), "utf-8")
    assert run.write(events=both) == run.html


def test_report_without_matplotlib_is_one_line(plain, monkeypatch, capfd):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command_line(monkeypatch, "report", plain.out) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("lillama: error: ") and "pip install 'lillama[report]'" in line


# In a browser
@pytest.mark.full
@pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="no Chromium with chromedriver (Debian: apt-get install chromium chromium-driver)",
)
def test_report_in_chromium_is_quiet_and_fits(run):
    run.write()
    url = (run.out / "report.html").as_uri()
    browser = Browser("--window-size=1000,900")

    def emulate(name: str, **params: object) -> None:
        body = {"cmd": f"Emulation.{name}", "params": params}
        browser.call("POST", f"{browser.session}/goog/cdp/execute", body)

    try:
        browser.open("about:blank")  # what Chromium loads for itself is in the log before it
        browser.log("performance")
        browser.open(url)
        role, name = browser.role("svg")
        assert role in ("image", "img") and name.startswith("Parameters by layer")
        colours = []
        for scheme in ("light", "dark"):
            emulate(
                "setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
            )
            colours.append(
                browser.run(
                    "return [getComputedStyle(document.body).backgroundColor,"
                    "getComputedStyle(document.querySelector('svg text')).fill]"
                )
            )
        assert colours[0] == ["rgb(255, 255, 255)", "rgb(26, 29, 35)"]
        assert colours[1] == ["rgb(20, 23, 28)", "rgb(230, 232, 235)"]
        emulate("setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
        browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        assert browser.run("return document.documentElement.scrollWidth") == 390
        assert (
            browser.run("return document.querySelector('svg').getBoundingClientRect().width") > 300
        )
        messages = "\n".join(entry["message"] for entry in browser.log("performance"))
        addresses = re.findall(r'"Network.requestWillBeSent".*?"url":"([^"]+)"', messages)
        assert set(addresses) == {url}
        assert browser.log("browser") == []
    finally:
        browser.close()
