"""The losses by rank: what report.json keeps of them, and the report's small multiples."""

import json
from pathlib import Path
from statistics import median

import pytest

pytest.importorskip("matplotlib", reason="needs lillama[report]")

import lillama  # noqa: E402
from lillama.compress import pipeline  # noqa: E402
from lillama.compress.measure import search  # noqa: E402
from lillama.compress.measure.search import MAX_POINTS, rank_losses  # noqa: E402
from lillama.compress.plan.allocate import Matrix  # noqa: E402
from lillama.config import ReportConfig  # noqa: E402
from lillama.errors import RunError  # noqa: E402
from lillama.report.data import read_facts  # noqa: E402
from lillama.report.plots import lines_of, plots_of  # noqa: E402


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


def test_report_json_has_the_losses_of_the_ranks(run):
    curves, ranks = run.report["rank_losses"], run.ranks
    assert set(ranks) <= set(curves) and ranks
    for losses in curves.values():
        values = list(losses.values())
        assert 0 < len(values) <= MAX_POINTS and values == sorted(values, reverse=True)
    cut = sum(curves[name][str(rank)] for name, rank in ranks.items())
    assert cut == pytest.approx(run.report["predicted_loss_increase"], rel=1e-4)


def test_losses_are_kept_when_a_run_is_interrupted_and_not_returned(mamba, text_file, tmp_path):
    out = tmp_path / "out"
    options = {"reduction": 0.3, "tokens": 400, "seq_len": 32, "device": "cpu", "preset": "fast"}

    def stop(stage: str, done: int, total: int) -> None:
        if "sensitivity" not in stage:
            raise RunError("stopped behind the search")

    with pytest.raises(RunError, match="stopped behind the search"):
        lillama.compress(mamba, out, text=text_file, progress=stop, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_measure", None)  # it is not measured again
        returned = lillama.compress(mamba, out, text=text_file, **options)
    assert "rank_losses" not in returned and returned["predicted_loss_increase"] > 0
    assert json.loads((out / "report.json").read_text("utf-8"))["rank_losses"]
    recipe = json.loads((out / "recipe.json").read_text("utf-8"))
    assert "rank_losses" not in pipeline._finished(out, recipe)


# What the page shows
def test_page_has_a_line_for_every_kind_and_block(run):
    report, ranks = run.report, run.ranks
    rows = {row[0]: row for row in run.page.tables["Loss left by rank"]}
    wanted = {"matrix", "embed_tokens", "lm_head"}
    wanted |= {f"block {b}: experts.{m}, 4 matrices" for b in (0, 1) for m in ("w1", "w2", "w3")}
    assert set(rows) == wanted
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
    assert "spectra" in {attrs.get("id") for attrs in run.page.all("section")}


def spectra_of(out: Path):
    facts = read_facts(ReportConfig(out=out))
    (plot,) = [plot for plot in plots_of(facts) if plot.key == "spectra"]
    return lines_of(facts), [axes for axes in plot.figure.axes if axes.get_visible()]


def test_plot_marks_the_cut_on_one_scale(run):
    panels, axes = spectra_of(run.out)
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


@pytest.mark.parametrize("zeros", [1, None], ids=["one", "all"])
def test_losses_of_zero_are_shown(zeros, run, tmp_path):
    curves = run.report["rank_losses"]
    curves |= {name: dict.fromkeys(curves[name], 0.0) for name in list(curves)[:zeros]}
    _, axes = spectra_of(run.copy(tmp_path, rank_losses=curves).out)
    assert axes[0].get_yscale() == ("log" if zeros else "linear")


def test_page_says_that_there_is_no_section(plain):
    assert "rank_losses" not in plain.report and "Loss left by rank" not in plain.page.tables
    assert "not shown: this run measured none." in " ".join(plain.page.texts["p"])


def test_page_tells_of_the_trained_head_and_the_whole_model(plain, tmp_path):
    head = {"held_out_kl_before": 0.375, "held_out_kl_after": 0.3125, "steps": 4, "best_step": 4}
    finetune = {"kl_before": 0.25, "kl_after": 0.125}
    text = plain.copy(tmp_path, head=head, finetune=finetune).write()
    assert "output head" in text and "from 0.375 to 0.3125 nats" in text
    assert "whole model" in text and "from 0.25 to 0.125 nats" in text
