"""The pivot gauge: the same product, a bounded C, and a model that computes what it did."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lillama
from lillama.checkpoint.gauge import LARGEST, PivotFactors, rounded, to_pivot
from lillama.checkpoint.headers import read_headers
from lillama.checkpoint.pivots import is_permutation, permutation_of, pivot_rows
from lillama.compress.plan.matrix import Matrix
from lillama.errors import InputError
from lillama.modules.low_rank_linear import PivotLowRankLinear
from tests.pivot_orders import choose_pivots

SIZES = [(40, 8, 24), (24, 16, 40), (300, 64, 100), (64, 64, 70), (5, 1, 3)]
OPTIONS = {"reduction": 0.2, "tokens": 900, "seq_len": 32, "gauge": "pivot"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(found: PivotFactors) -> tuple[Tensor, Tensor]:
    """A and B."""
    return found.A, pivot_rows(found.C, found.permutation)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_product_stays_and_c_is_bounded(size):
    N, R, K = size
    A, B = random(R, K), random(N, R, seed=1)
    B[: R // 2] *= 1e-6  # rows that no one should choose
    found = to_pivot(A, B)
    assert found.A.shape == (R, K) and found.C.shape == (N - R, R)
    assert found.pivot_mask.dtype == torch.uint8 and found.pivot_mask.shape == (N,)
    assert int(found.pivot_mask.sum()) == R and is_permutation(found.permutation)
    # rows of A and of C in ascending order of their outputs
    W, is_pivot = B @ A, found.pivot_mask.bool()
    torch.testing.assert_close(W[is_pivot], found.A, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(W[~is_pivot], found.C @ found.A, rtol=1e-9, atol=1e-9)
    a, b = plain(found)
    torch.testing.assert_close(b @ a, B @ A, rtol=1e-9, atol=1e-9)
    assert found.largest <= LARGEST
    assert not len(found.C) or found.largest == float(found.C.abs().max())


def test_exchanges_bound_c_where_elimination_alone_does_not():
    """Kahan-like rows: elimination with row pivoting takes the first R, and C grows as 2^R."""
    R = 16
    B = torch.eye(R, dtype=torch.float64) + torch.ones(R, R, dtype=torch.float64).tril(-1) * -1
    B = torch.cat([B, random(4, R, seed=3).sign()])
    assert to_pivot(random(R, 20), B).largest <= LARGEST


def test_factors_of_lower_rank_than_their_size():
    B = random(40, 3) @ random(3, 8, seed=1)
    A = random(8, 20, seed=2)
    found = to_pivot(A, B)
    a, b = plain(found)
    torch.testing.assert_close(b @ a, B @ A, rtol=1e-8, atol=1e-8)
    zero = to_pivot(A, torch.zeros(40, 8))
    assert torch.isfinite(zero.C).all() and not zero.A.any()


def test_rounding_costs_about_what_it_costs_plain_factors():
    A, B = random(64, 200) / 200**0.5, random(256, 64, seed=1) / 8
    W, found = B @ A, to_pivot(A, B)

    def error(a: Tensor, b: Tensor, dtype: torch.dtype) -> float:
        rounded = b.to(dtype).double() @ a.to(dtype).double()
        return float((rounded - W).norm() / W.norm())

    def stored(dtype: torch.dtype) -> float:
        part = rounded(found, dtype)
        return error(*plain(part), dtype)

    assert stored(torch.float32) < 1e-6
    assert stored(torch.bfloat16) < 2 * error(A, B, torch.bfloat16)
    # fitting C to the rounded A pays
    a, b = plain(found)
    assert stored(torch.bfloat16) < 0.97 * error(a, b, torch.bfloat16)


def test_numbers_of_a_matrix():
    plain, pivot = Matrix("m", 0, 96, 64), Matrix("m", 0, 96, 64, pivot=True)
    assert plain.saved(16) == 96 * 64 - 16 * 160
    assert pivot.params_saved(16) == 96 * 64 - 16 * (160 - 16)
    # the mark of each of 96 outputs takes a byte, half a number of 16 bits
    assert pivot.mask_bytes == 96 and plain.mask_bytes == 0
    assert pivot.saved(16) == pivot.params_saved(16) - 48
    odd = Matrix("m", 0, 97, 64, pivot=True)
    assert odd.mask_bytes == 97 and odd.saved(16) == odd.params_saved(16) - 49
    assert plain.break_even_rank == 32 and pivot.break_even_rank == 56
    assert all(pivot.saved(rank) > 0 for rank in pivot.ranks)
    for matrix in (plain, pivot):
        for fraction in (0.1, 0.5, 0.9):
            rank = matrix.rank_at(fraction)
            change = 48 - rank**2 if matrix.pivot else 0
            assert rank * 160 + change == pytest.approx(fraction * 96 * 64)


@pytest.fixture
def compressed(mamba, text_file, tmp_path, device):
    """compressed(name, **options) -> (report, OUT)"""

    def run(name: str = "out", **options):
        values = {**OPTIONS, "text": text_file, "device": str(device), **options}
        return lillama.compress(mamba, tmp_path / name, **values), tmp_path / name

    return run


@pytest.fixture(scope="module")
def once(mamba, text_file, tmp_path_factory, device) -> Path:
    """What OPTIONS make of it; not to be changed."""
    out = tmp_path_factory.mktemp("gauge") / "out"
    lillama.compress(mamba, out, text=text_file, device=str(device), **OPTIONS)
    return out


@pytest.fixture
def copied(once, tmp_path) -> Path:
    return Path(shutil.copytree(once, tmp_path / "copy"))


@pytest.mark.parametrize(("strategy", "dtype"), [("global", "float32"), ("uniform", "bfloat16")])
def test_model_in_the_pivot_gauge(strategy, dtype, compressed, mamba, short_text, device):
    report, out = compressed(strategy=strategy, dtype=dtype)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["gauge"] == "pivot"
    tensors = {k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()}
    assert not [name for name in tensors if name.endswith(".lr_B")]
    model = AutoModelForCausalLM.from_pretrained(out)
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PivotLowRankLinear)
    }
    assert set(modules) == set(config["ranks"])
    for name, module in modules.items():
        assert module.rank == config["ranks"][name]
        numbers = sum(p.numel() for p in module.parameters())
        matrix = Matrix(name, 0, module.out_features, module.in_features, pivot=True)
        assert numbers == matrix.numbers(module.rank)
        assert float(module.lr_C.detach().abs().max()) <= LARGEST * 1.01
        x = torch.randn(5, module.in_features).to(module.lr_A.dtype)
        tolerance = (
            {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.1, "atol": 0.05}
        )
        torch.testing.assert_close(module(x), x @ module.weight.mT, **tolerance)
    assert sum(p.numel() for p in model.parameters()) == report["params_after"]
    assert report["reduction"] >= 0.2
    assert all(0 < row["pivot_largest"] <= LARGEST for row in report["blocks"])
    measured = lillama.eval(out, short_text, against=mamba, seq_len=64, device=str(device))
    assert measured["params"] == report["params_after"]
    assert measured["bytes"] == report["bytes_after"]
    assert 0.8 < measured["retained"] < 1.1
    assert lillama.generate(out, "the cat", max_new_tokens=3, device=str(device))


def test_conversion_changes_nothing_but_rounding(compressed, monkeypatch):
    """The student as it was trained, and what is stored of it."""
    from lillama.compress.train import student as student_module

    seen = {}
    original = student_module.to_pivot

    def convert(A, B):
        found = original(A, B)
        seen[tuple(B.shape), float(A.sum())] = (B.double() @ A.double(), found)
        return found

    monkeypatch.setattr(student_module, "to_pivot", convert)
    _, out = compressed(dtype="float32")
    assert len(seen) == len(
        json.loads((out / "config.json").read_text())["quantization_config"]["ranks"]
    )
    tensors = {k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()}
    for W, found in seen.values():
        name = next(
            key.removesuffix(".lr_A") for key, value in tensors.items()
            if key.endswith(".lr_A") and torch.equal(value, found.A.float())
        )  # fmt: skip
        A, C, marks = (tensors[f"{name}.{key}"] for key in ("lr_A", "lr_C", "lr_pivots"))
        a, b = A, pivot_rows(C, permutation_of(marks, len(A)))
        assert float((b.double() @ a.double() - W).norm() / W.norm()) < 1e-5


def test_resumed_run_ends_with_the_same_bits(compressed):
    """The finished block comes back from its shard in the pivot gauge."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "block 1 train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressed(strategy="uniform", progress=stop)
    _, out = compressed(strategy="uniform")
    _, whole = compressed("whole", strategy="uniform")
    for file in whole.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_saved_again_and_loaded(once, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(once)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


def edited(out: Path, edit: Callable[[dict[str, Tensor], str], None]) -> str:
    """Change the marks of one matrix in a checkpoint: edit(its shard's tensors, their name)."""
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [key for key in tensors if key.endswith(".lr_pivots")]:
            edit(tensors, name)
            save_file(tensors, file, {"format": "pt"})
            return name
    raise AssertionError("no marks")


def one_more(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name][tensors[name].argmin()] = 1


def one_less(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name][tensors[name].argmax()] = 0


def another_value(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name][tensors[name].argmin()] = 2


def as_version_1_had_it(tensors: dict[str, Tensor], name: str) -> None:
    marks = tensors.pop(name)
    order = permutation_of(marks, int(marks.sum()))
    tensors[name.replace("lr_pivots", "lr_order")] = order


@pytest.mark.parametrize("edit", [one_more, one_less, another_value])
def test_marks_that_do_not_fit_the_rank_are_refused(edit, copied):
    ranks = json.loads((copied / "config.json").read_text())["quantization_config"]["ranks"]
    name = edited(copied, edit)
    rank = ranks[name.removesuffix(".lr_pivots")]
    with pytest.raises(
        InputError, match=f"{name} must be 1 for {rank} of .*damaged: copy"
    ) as error:
        AutoModelForCausalLM.from_pretrained(copied)
    assert "\n" not in str(error.value)


def test_missing_marks_are_refused(copied):
    name = edited(copied, lambda tensors, name: tensors.pop(name))
    with pytest.raises(InputError, match=f"missing factors: {name}"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_the_format_before_the_marks_is_refused_in_one_line(copied):
    out = copied
    edited(out, as_version_1_had_it)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (out / "config.json").write_text(json.dumps(config))
    for load in (lillama.generate, lambda path, _: AutoModelForCausalLM.from_pretrained(path)):
        with pytest.raises(InputError, match="format_version .*1.*compress again") as error:
            load(out, "the cat")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_bytes_are_what_the_plan_says(dtype, make_checkpoint, text_file, tmp_path, device):
    """To the byte, of each matrix; some have an odd number of outputs."""
    base = make_checkpoint("mixtral", getattr(torch, dtype), intermediate_size=67)
    options = {"strategy": "uniform", "gauge": "pivot"}
    plan = lillama.plan(base, 0.2, **options)
    out = tmp_path / "out"
    report = lillama.compress(
        base, out, reduction=0.2, tokens=900, seq_len=32, text=text_file, train=False,
        device=str(device), **options,
    )  # fmt: skip
    headers = read_headers(out)
    pivots = [row for row in plan["matrices"] if f"{row['name']}.lr_pivots" in headers]
    assert pivots and any(row["shape"][0] % 2 for row in pivots)
    for row in plan["matrices"]:
        parts = [h.num_bytes for n, h in headers.items() if n.startswith(f"{row['name']}.lr_")]
        assert sum(parts) == row["bytes_after"], row["name"]
    for row in pivots:
        header = headers[f"{row['name']}.lr_pivots"]
        assert (header.dtype, header.shape) == ("U8", (row["shape"][0],))
    assert report["bytes_after"] == plan["bytes_after"]


@torch.no_grad()
def test_marks_follow_the_order_wherever_it_came_from(make_low_rank, tmp_path, device):
    """What is saved is made of the order that the model computes with, not of an older one."""
    ranks = {f"backbone.layers.{i}.mixer.in_proj": 16 + i for i in range(2)}
    first = make_low_rank("mamba", ranks, gauge="pivot").to(device)
    second = copy.deepcopy(first)
    modules = [m for m in second.modules() if isinstance(m, PivotLowRankLinear)]
    for module in modules:
        choose_pivots(module)
    ids = torch.arange(1, 20, device=device)[None]
    wanted = second(ids, use_cache=False).logits
    assert not torch.equal(first(ids, use_cache=False).logits, wanted)
    first.load_state_dict(second.state_dict())
    for model in (first, second.to("cpu"), copy.deepcopy(first)):
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(device)
        assert torch.equal(loaded(ids, use_cache=False).logits, wanted)
    modules[0].lr_order.copy_(modules[0].lr_order.flip(0))
    with pytest.raises(ValueError, match="with the rows of A and those of C in ascending order"):
        second.save_pretrained(tmp_path)


def test_a_gauge_that_there_is_not_is_refused(mixtral):
    with pytest.raises(InputError, match="--gauge must be one of plain, pivot, got 'skew'"):
        lillama.plan(mixtral, 0.2, gauge="skew")  # type: ignore[arg-type]
