"""The report: every figure on the page, nothing that a browser would fetch, errors in one line."""

import base64
import hashlib
import json
import re
import shlex
import shutil
import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs lillama[report]")

import lillama  # noqa: E402
from lillama import cli  # noqa: E402
from lillama.errors import InputError, RunError  # noqa: E402
from lillama.report.sections import format_number  # noqa: E402
from tests.report.html_page import Page  # noqa: E402
from tests.webdriver import CHROMEDRIVER, CHROMIUM, Browser  # noqa: E402

KINDS = ["mixtral", "mamba"]
SCRIPT = "<script>alert(1)</script>"
PLOTS = {"sizes", "ranks", "held-out-loss", "loss-curves", "time-memory"}


@dataclass
class Run:
    """A compression and what it left."""

    model: Path
    out: Path
    events: Path
    eval: Path
    # the page with everything on it
    html: str = ""

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "report.json").read_text("utf-8"))

    @property
    def page(self) -> str:
        return (self.out / "report.html").read_text("utf-8")

    def write(self, **options: Any) -> str:
        lillama.report(self.out, events=self.events, eval=self.eval, **options)
        return self.page

    def copy(self, folder: Path) -> "Run":
        """To be damaged."""
        shutil.copytree(self.out, folder / "out")
        return Run(self.model, folder / "out", self.events, self.eval)

    def edit(self, name: str, **changes: object) -> None:
        values = json.loads((self.out / name).read_text("utf-8"))
        (self.out / name).write_text(json.dumps(values | changes), "utf-8")


@pytest.fixture(scope="module")
def runs(make_checkpoint, text_file, tmp_path_factory, device):
    """{kind: Run}: trained, with events and a comparison; the Mamba's base has a hostile name."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("report")
        model = folder / ("base" if kind == "mixtral" else "<b>&'\" base")
        shutil.copytree(
            make_checkpoint(kind, tie_word_embeddings=False, num_hidden_layers=3), model
        )
        run = Run(model, folder / "out", folder / "events.jsonl", folder / "eval.json")
        lillama.compress(
            model, run.out, reduction=0.4, text=text_file, tokens=600, seq_len=32,
            preset="default", events=run.events, device=str(device),
        )  # fmt: skip
        quality = lillama.eval(run.out, text_file, against=model, seq_len=64, device=str(device))
        run.eval.write_text(json.dumps(quality), "utf-8")
        run.html = run.write()
        found[kind] = run
    return found


@pytest.fixture(params=KINDS)
def run(request, runs) -> Run:
    return runs[request.param]


def cells(table: list[list[str]]) -> set[str]:
    return {cell for row in table for cell in row}


# What is on it
def test_report_has_every_figure_of_its_files(run):
    page, report = Page(run.html), run.report
    quality = json.loads(run.eval.read_text("utf-8"))
    sizes = page.tables["Parameters and bytes by layer"]
    names = ("params_before", "params_after", "bytes_before", "bytes_after")
    assert sizes[-1] == ["whole model", *(f"{report[name]:,}" for name in names)]
    columns = list(zip(*sizes[1:-1], strict=True))[1:]
    sums = [sum(int(cell.replace(",", "")) for cell in column) for column in columns]
    assert sums == [report[name] for name in names]
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


def test_report_lists_every_rank_with_its_break_even(run):
    config = json.loads((run.out / "config.json").read_text("utf-8"))["quantization_config"]
    table = Page(run.html).tables["Rank of each target matrix"][1:]
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
    table = Page(run.html).tables["Held-out loss while training"][1:]
    judged = [json.loads(line) for line in run.events.read_text("utf-8").splitlines()]
    wanted = {
        (str(e["block"]), str(e["step"]), format_number(e["held_out_loss"]))
        for e in judged
        if e["event"] == "judged"
    }
    assert {tuple(line) for line in table} == wanted and len(wanted) > 4


def test_report_tells_of_experts(runs):
    page = Page(runs["mixtral"].html)
    table = page.tables["Calibration tokens by expert"]
    for line, row in zip(table[1:], runs["mixtral"].report["blocks"], strict=True):
        assert line[1:-1] == [f"{tokens:,}" for tokens in row["expert_tokens"]]
        assert line[-1] == (", ".join(map(str, row["starved_experts"])) or "none")
    assert "Calibration tokens by expert" not in Page(runs["mamba"].html).tables


def test_report_without_events_and_eval_says_how_to_get_them(run):
    lillama.report(run.out)
    page = Page(run.page)
    assert "give the events file of the run with --events" in " ".join(page.texts["p"])
    assert "--eval eval.json" in page.texts["code"]
    assert "Held-out loss while training" not in page.tables


def test_report_command_makes_the_same_model_again(runs, tmp_path, monkeypatch):
    run = runs["mamba"]
    (command,) = Page(run.html).texts["code"]
    words = shlex.split(command)
    assert words[:4] == ["lillama", "compress", str(run.model), str(run.out)]
    again = tmp_path / "again"
    monkeypatch.setattr(sys, "argv", [*words[:3], str(again), *words[4:]])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    options = [json.loads((out / "recipe.json").read_text())["options"] for out in (run.out, again)]
    assert options[0] == options[1]
    for file in run.out.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


# How it is made
def test_report_is_one_file_that_its_policy_allows(run):
    text = run.html
    page = Page(text)
    assert not re.search(r"https?:|//\w|@import|\bon\w+=|\bstyle=|javascript:|xmlns", text)
    assert all(target.startswith("(#") for target in re.findall(r"url(\([^)]*)", text))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "image", "iframe", "object", "embed", "form"}
    (policy,) = [
        m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"
    ]
    (inline,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {a["href"] for _, a in page.elements if "href" in a}
    targets |= {f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", text)}
    assert targets <= {f"#{name}" for name in ids} and targets
    classes = {attrs["class"] for tag, attrs in page.elements if "class" in attrs}
    assert {c for c in classes if c.startswith("p")} <= set(
        re.findall(r"^\.(p\d+)\{", inline, re.M)
    )


def test_report_can_be_read_aloud_and_on_a_phone(run):
    page = Page(run.html)
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )
    assert "prefers-color-scheme:dark" in page.texts["style"][0]
    headings = [tag for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert headings[0] == "h1" and set(headings[1:]) == {"h2"}
    plots = page.all("svg")
    assert len(plots) == len(page.texts["title"]) - 1 >= len(PLOTS)
    for plot in plots:
        assert plot["role"] == "img" and "width" not in plot
        title, description = (plot["aria-labelledby"] or "").split()
        assert {"id": title} in page.all("title") and {"id": description} in page.all("desc")
    assert all(len(text) > 40 for text in page.texts["desc"])
    assert page.all("table") and len(page.all("table")) == len(page.all("caption"))
    for table in page.tables.values():
        assert len({len(row) for row in table}) == 1 and len(table) > 1
    assert {a["scope"] for a in page.all("th")} == {"col", "row"}
    # letters take the page's colour, dark or light
    assert "fill: currentColor" in page.texts["style"][0]
    assert "#010203" not in run.html


def test_report_escapes_every_text_of_its_files(runs, tmp_path):
    run = runs["mixtral"].copy(tmp_path)
    recipe = json.loads((run.out / "recipe.json").read_text("utf-8"))
    options = recipe["options"] | {"model": SCRIPT, "text": [SCRIPT, "\ud800"], "loss": SCRIPT}
    options |= {"preset": SCRIPT, "dtype": SCRIPT, "strategy": SCRIPT}
    run.edit(
        "recipe.json", options=options, versions={SCRIPT: SCRIPT}, device=SCRIPT,
        model_sha256=SCRIPT, data_sha256={SCRIPT: SCRIPT},
    )  # fmt: skip
    run.edit("report.json", device=SCRIPT)
    evil = run.out.rename(tmp_path / "<script>x")
    assert lillama.report(evil) == [evil / "report.html"]
    text = (evil / "report.html").read_text("utf-8")
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 10
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.texts["h1"][0].startswith("<script>x: ")


def test_report_is_the_same_twice(run):
    assert run.write() == run.html


def test_report_png_writes_the_plots(run, tmp_path):
    folder = tmp_path / "plots"
    written = lillama.report(str(run.out), events=str(run.events), png=str(folder))
    assert written[0] == run.out / "report.html"
    assert {file.stem for file in written[1:]} >= PLOTS
    assert sorted(folder.iterdir()) == sorted(written[1:])
    for file in written[1:]:
        data = file.read_bytes()
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        assert data.startswith(b"\x89PNG") and width > 900 and height > 250


def test_report_open_shows_the_page(run, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    lillama.report(run.out, open=True)
    assert opened == [(run.out / "report.html").as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    with pytest.raises(RunError, match="no browser was found"):
        lillama.report(run.out, open=True)


# What it refuses
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("report.json", {"params_after": 5}, "they are not of the same run"),
        ("report.json", {"seconds": float("nan")}, "seconds must be a finite number, got nan"),
        ("report.json", {"blocks": [{}]}, r"blocks\[0\]: index must be a finite number, got None"),
        ("report.json", {"blocks": 3}, "blocks must be a list"),
        ("recipe.json", {"options": {}}, "has no options of a compression"),
        ("config.json", {"quantization_config": None}, "is a dense model"),
    ],
)
def test_report_damaged_files_are_refused(name, changes, message, runs, tmp_path):
    run = runs["mamba"].copy(tmp_path)
    run.edit(name, **changes)
    (run.out / "report.html").unlink(missing_ok=True)
    with pytest.raises(InputError, match=message):
        lillama.report(run.out)
    assert not (run.out / "report.html").exists()


@pytest.mark.parametrize("name", ["report.json", "recipe.json"])
def test_report_missing_files_are_named(name, runs, tmp_path):
    run = runs["mamba"].copy(tmp_path)
    (run.out / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing; `lillama compress` writes it"):
        lillama.report(run.out)
    (run.out / name).write_text("[1]")
    with pytest.raises(InputError, match=f"{name} must hold a JSON object"):
        lillama.report(run.out)


def test_report_files_of_another_run_are_refused(runs):
    run, other = runs["mixtral"], runs["mamba"]
    with pytest.raises(InputError, match="is of another run: there block"):
        lillama.report(run.out, events=other.events)
    with pytest.raises(InputError, match="is about another model: it has"):
        lillama.report(run.out, eval=other.eval)
    with pytest.raises(InputError, match="tells of no finished block"):
        lillama.report(run.out, events=run.eval)


def test_report_events_of_several_runs_end_with_the_last(runs, tmp_path):
    run, other = runs["mixtral"], runs["mamba"]
    both = tmp_path / "both.jsonl"
    both.write_text(other.events.read_text("utf-8") + run.events.read_text("utf-8"), "utf-8")
    lillama.report(run.out, events=both, eval=run.eval)
    assert run.page == run.html


def test_report_without_matplotlib_is_one_line(run, monkeypatch, capfd):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["lillama", "report", str(run.out)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    (line,) = capfd.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("lillama: error: ")
    assert "pip install 'lillama[report]'" in line


def test_report_command_prints_what_it_wrote(run, monkeypatch, capfd, tmp_path):
    words = ["report", run.out, "--events", run.events, "--eval", run.eval, "--png", tmp_path]
    monkeypatch.setattr(sys, "argv", ["lillama", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capfd.readouterr()
    assert not caught.value.code and err == ""
    assert out.splitlines()[0] == str(run.out / "report.html")
    assert all(Path(line).is_file() for line in out.splitlines())


# In a browser
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
