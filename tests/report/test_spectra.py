"""The losses by rank: what report.json keeps of them, and the report's small multiples."""

import json
import math
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs lillama[report]")

import lillama  # noqa: E402
from lillama.compress import pipeline, search  # noqa: E402
from lillama.compress.allocate import Matrix  # noqa: E402
from lillama.compress.search import MAX_POINTS, rank_losses  # noqa: E402
from lillama.config import ReportConfig  # noqa: E402
from lillama.errors import InputError, RunError  # noqa: E402
from lillama.report.data import read_facts  # noqa: E402
from lillama.report.spectra import COLUMNS, lines_of, spectra_plot  # noqa: E402
from tests.report.html_page import Page  # noqa: E402

OPTIONS: dict[str, Any] = {"reduction": 0.3, "tokens": 400, "seq_len": 32, "device": "cpu"}
TARGETS = ("w1", "w2", "w3", "embed_tokens", "lm_head")


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text("utf-8"))


def page_of(out: Path) -> Page:
    lillama.report(out)
    return Page((out / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def out(make_checkpoint, text_file, tmp_path_factory) -> Path:
    """A mixture of experts whose run was interrupted after the search of its ranks."""
    path = tmp_path_factory.mktemp("spectra") / "out"
    model = make_checkpoint("mixtral", tie_word_embeddings=False)
    options = {**OPTIONS, "text": text_file, "preset": "fast", "targets": TARGETS}

    def stop(stage: str, done: int, total: int) -> None:
        if "sensitivity" not in stage:
            raise RunError("stopped behind the search")

    with pytest.raises(RunError, match="stopped behind the search"):
        lillama.compress(model, path, progress=stop, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_measure", None)  # it is not measured again
        returned = lillama.compress(model, path, **options)
    assert "rank_losses" not in returned and returned["predicted_loss_increase"] > 0
    return path


@pytest.fixture
def copy(out, tmp_path):
    """copy(**changes of report.json) -> OUT; None takes an entry away."""

    def make(**changes: Any) -> Path:
        path = tmp_path / "copy"
        shutil.copytree(out, path)
        values = {k: v for k, v in (report_of(out) | changes).items() if v is not None}
        (path / "report.json").write_text(json.dumps(values), "utf-8")
        return path

    return make


# What report.json keeps
def test_points_are_the_measured_ones_even_and_with_the_cut():
    matrix, small = Matrix("w", 0, 4096, 4096), Matrix("s", 0, 64, 64)
    losses = {m.name: [1 / (3 * rank) for rank in m.ranks] for m in (matrix, small)}
    assert len(matrix.ranks) > 7 * MAX_POINTS > len(small.ranks)
    for chosen in (matrix.ranks[0], 1000, matrix.ranks[-1]):
        found = rank_losses([matrix, small], {"w": chosen}, losses)
        ranks = [int(rank) for rank in found["w"]]
        assert MAX_POINTS - 1 <= len(ranks) <= MAX_POINTS and ranks == sorted(set(ranks))
        assert {matrix.ranks[0], chosen, matrix.ranks[-1]} <= set(ranks) <= set(matrix.ranks)
        even = [rank for rank in ranks if rank != 1000]
        steps = [b - a for a, b in zip(even, even[1:], strict=False)]
        assert max(steps) - min(steps) <= 8
        assert all(
            loss == pytest.approx(1 / (3 * int(r)), rel=1e-4) for r, loss in found["w"].items()
        )
        assert [int(rank) for rank in found["s"]] == list(small.ranks), "no more than it has"
    assert rank_losses([matrix], {}, {}) == {}


def test_points_of_thousands_of_experts_are_few():
    matrices = [Matrix(f"experts.{i}", 0, 1024, 1024) for i in range(7000)]
    losses = {m.name: [1.0] * len(m.ranks) for m in matrices}
    found = rank_losses(matrices, {"experts.3": 24}, losses)
    assert len(found) == 7000 and max(map(len, found.values())) == 9
    assert "24" in found["experts.3"] and "24" not in found["experts.4"]


def test_report_json_has_the_losses_of_the_ranks_also_after_an_interruption(out):
    report = report_of(out)
    ranks = json.loads((out / "config.json").read_text())["quantization_config"]["ranks"]
    curves = report["rank_losses"]
    assert set(ranks) <= set(curves) and ranks
    for losses in curves.values():
        values = list(losses.values())
        assert 0 < len(values) <= MAX_POINTS and values == sorted(values, reverse=True)
    cut = sum(curves[name][str(rank)] for name, rank in ranks.items())
    assert cut == pytest.approx(report["predicted_loss_increase"], rel=1e-4)


def test_a_finished_run_that_is_asked_again_returns_no_curves(out):
    recipe = json.loads((out / "recipe.json").read_text("utf-8"))
    assert "rank_losses" not in pipeline._finished(out, recipe)


# What the page shows
def test_page_has_a_line_for_every_kind_and_block(out):
    page, report = page_of(out), report_of(out)
    ranks = json.loads((out / "config.json").read_text())["quantization_config"]["ranks"]
    rows = {row[0]: row for row in page.tables["Loss left by rank"]}
    assert rows["matrix"] == list(COLUMNS)
    wanted = {"embed_tokens", "lm_head"}
    wanted |= {f"block {b}: experts.{m}, 4 matrices" for b in (0, 1) for m in ("w1", "w2", "w3")}
    assert set(rows) == {"matrix", *wanted}
    seen = 0
    for name, row in rows.items():
        if ", 4 matrices" not in name:
            continue
        block, kind = name[6], name.partition("experts.")[2].partition(",")[0]
        experts = [f"model.layers.{block}.block_sparse_moe.experts.{e}.{kind}" for e in range(4)]
        curves = [report["rank_losses"][expert] for expert in experts]
        low = min(map(int, curves[0]))
        assert row[5:7] == [str(low), f"{median(c[str(low)] for c in curves):.4g}"]
        chosen = [
            (ranks[x], c[str(ranks[x])]) for x, c in zip(experts, curves, strict=True) if x in ranks
        ]
        seen += len(chosen)
        if not chosen:
            assert row[2:5] == ["dense", "-", "-"]
            continue
        rank = median(r for r, _ in chosen)
        assert row[2].split(" ")[0].strip(",") == f"{rank:g}"
        assert (f"{4 - len(chosen)} dense" in row[2]) == (len(chosen) < 4)
        assert row[3:5] == [f"{rank / 32:.1%}", f"{median(x for _, x in chosen):.4g}"]
    assert seen > 4
    assert "spectra" in {attrs.get("id") for attrs in page.all("section")}


def test_plot_marks_the_cut_on_one_scale(out):
    facts = read_facts(ReportConfig(out=out))
    plot = spectra_plot(facts)
    assert plot is not None
    panels = lines_of(facts)
    axes = [a for a in plot.figure.axes if a.get_visible()]
    assert [a.get_title() for a in axes] == list(panels)
    for a, lines in zip(axes, panels.values(), strict=True):
        marks = {
            tuple(map(float, c.get_offsets()[0])) for c in a.collections if len(c.get_offsets())
        }
        wanted = {(m[0] / x.full, m[1]) for x in lines if (m := x.mark) is not None}
        assert {m for m in marks if m != (0.0, 0.0)} == wanted
        assert a.get_yscale() == "log" and a.get_ylim() == axes[0].get_ylim()
        low, high = a.get_ylim()
        assert all(low < loss < high for _, loss in wanted)
    assert ", ".join(panels) in plot.description and "most loss is left by" in plot.description


def test_a_loss_of_zero_and_a_title_of_two_kinds_are_shown(copy, out):
    curves = report_of(out)["rank_losses"]
    name = next(iter(curves))
    curves[name] = dict.fromkeys(curves[name], 0.0)
    facts = read_facts(ReportConfig(out=copy(rank_losses=curves)))
    assert spectra_plot(facts) is not None
    flat = {n: dict.fromkeys(c, 0.0) for n, c in curves.items()}
    facts.report["rank_losses"] = flat
    plot = spectra_plot(facts)
    assert plot is not None and plot.figure.axes[0].get_yscale() == "linear"


def test_page_says_why_there_is_no_section(copy, make_checkpoint, text_file, tmp_path):
    old = page_of(copy(rank_losses=None))
    assert "Loss left by rank" not in old.tables
    assert "report.json is of a version that did not keep it." in " ".join(old.texts["p"])
    plain = tmp_path / "whitened"
    lillama.compress(
        make_checkpoint("mamba"), plain, text=text_file, preset="whitened", train=False, **OPTIONS
    )
    assert "rank_losses" not in report_of(plain)
    assert "not shown: this run measured none." in " ".join(page_of(plain).texts["p"])


def test_page_tells_of_the_trained_head_and_the_whole_model(copy):
    head = {"held_out_kl_before": 0.375, "held_out_kl_after": 0.3125, "steps": 4, "best_step": 4}
    said = page_of(copy(head=head, finetune={"kl_before": 0.25, "kl_after": 0.125})).texts["p"]
    assert any("output head" in text and "from 0.375 to 0.3125 nats" in text for text in said)
    assert any("whole model" in text and "from 0.25 to 0.125 nats" in text for text in said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_losses": [1]}, "rank_losses must be an object, got list"),
        ({"rank_losses": {"model.layers.0.w9": {"8": 1.0}}}, "no target of recipe.json's run"),
        ({"head": {"held_out_kl_before": 1.0}}, "head: held_out_kl_after must be a finite number"),
        ({"finetune": 3}, "finetune must be an object, got int"),
    ],
)
def test_damaged_entries_are_refused(changes, message, copy):
    with pytest.raises(InputError, match=message):
        lillama.report(copy(**changes))


@pytest.mark.parametrize("losses", [3, {"8": math.nan}, {"8": "1"}, {"eight": 1.0}, {"0": 1.0}])
def test_damaged_curves_are_refused(losses, copy, out):
    name = next(iter(report_of(out)["rank_losses"]))
    with pytest.raises(InputError, match=f"rank_losses.{name} must be"):
        lillama.report(copy(rank_losses={name: losses}))
