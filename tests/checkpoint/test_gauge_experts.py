"""A mixture of experts in the pivot gauge: compressed, stored, loaded, exported and served."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lillama
from lillama.checkpoint.export import export
from lillama.checkpoint.gauge import LARGEST, rounded, to_pivot
from lillama.checkpoint.pivots import pivot_rows
from lillama.errors import InputError
from lillama.integrations.loading import load_model
from lillama.modules.low_rank_experts import LowRankExperts, PivotLowRankExperts
from lillama.serve.engine import LocalEngine
from lillama.serve.models.experts import expand_pivots
from tests.serve.heard import Heard, greedy

OPTIONS = {"reduction": 0.3, "tokens": 900, "seq_len": 32, "preset": "fast"}


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def quantization(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())["quantization_config"]


@torch.no_grad()
def logits_of(path: Path, device: torch.device) -> Tensor:
    ids = torch.randint(1, 300, (3, 21), generator=torch.Generator().manual_seed(0)).to(device)
    return load_model(path, device, "float32")(input_ids=ids, use_cache=False).logits.cpu()


@pytest.fixture(scope="module")
def compressed(mixtral, text_file, tmp_path_factory, device):
    """compressed(name, **options) -> (report, OUT), made once; without options in the preset's
    gauge."""
    made: dict[str, tuple[dict, Path]] = {}
    root = tmp_path_factory.mktemp("experts")

    def run(name: str = "out", **options) -> tuple[dict, Path]:
        if name not in made:
            values = {**OPTIONS, "text": text_file, "device": str(device), **options}
            made[name] = lillama.compress(mixtral, root / name, **values), root / name
        return made[name]

    return run


def close(found: Tensor, wanted: Tensor, relative: float = 1e-5) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < relative


def test_preset_stores_experts_in_the_pivot_gauge(compressed, mixtral, short_text, device):
    report, out = compressed()
    values, tensors = quantization(out), tensors_of(out)
    experts = {name: rank for name, rank in values["ranks"].items() if ".experts." in name}
    assert values["gauge"] == "pivot" and experts
    for name, rank in experts.items():
        A, C, marks = (tensors[f"{name}.{key}"] for key in ("lr_A", "lr_C", "lr_pivots"))
        assert A.shape[0] == rank == C.shape[1] and f"{name}.lr_B" not in tensors
        assert len(marks) == sum(C.shape) and marks.dtype == torch.uint8
        assert int(marks.sum()) == rank and int(marks.max()) <= 1
        assert float(C.abs().max()) <= LARGEST * 1.01
    model = load_model(out, device)
    modules = [m for m in model.modules() if isinstance(m, PivotLowRankExperts)]
    assert len(modules) == len({name.partition(".experts.")[0] for name in experts})
    counted = [n for n in tensors if not n.endswith((".lr_pivots", "down_proj"))]
    stored = sum(tensors[name].numel() for name in counted)
    assert report["params_after"] == stored
    assert report["reduction"] >= 0.3
    assert all(0 < row["pivot_largest"] <= LARGEST for row in report["blocks"])
    measured = lillama.eval(out, short_text, against=mixtral, seq_len=64, device=str(device))
    assert measured["params"] == report["params_after"]
    assert measured["bytes"] == report["bytes_after"]
    assert 0.8 < measured["retained"] < 1.2
    assert lillama.generate(out, "the cat", max_new_tokens=3, device=str(device))


def test_one_budget_buys_more_rank_than_in_the_plain_gauge(compressed, mixtral):
    report, out = compressed()
    plain_report, plain = compressed("plain", gauge="plain")
    assert quantization(plain)["gauge"] == "plain"
    assert sum(quantization(out)["ranks"].values()) > sum(quantization(plain)["ranks"].values())
    # of so small experts the marks of the outputs take 3%
    for found, most in ((report, 0.36), (plain_report, 0.33)):
        assert 0.3 <= found["reduction"] < most
        assert 1 - found["bytes_after"] / found["bytes_before"] < 0.33
    plan = lillama.plan(mixtral, 0.3, strategy="uniform", preset="fast")
    assert plan["gauge"] == "pivot"
    for row in plan["matrices"]:
        (N, K), R = row["shape"], row["rank"]
        assert row["params_after"] == R * (N + K) - R**2


def test_export_to_every_format_keeps_the_logits(compressed, tmp_path, device):
    _, out = compressed()
    wanted = logits_of(out, device)
    for format in ("dense", "plain"):
        report = export(out, tmp_path / format, format=format)
        assert report["matrices"] == len(quantization(out)["ranks"])
        close(logits_of(tmp_path / format, device), wanted)
    export(tmp_path / "plain", tmp_path / "pivot", format="pivot")
    close(logits_of(tmp_path / "pivot", device), wanted)
    tensors, ranks = tensors_of(tmp_path / "pivot"), quantization(out)["ranks"]
    assert all(f"{name}.lr_C" in tensors for name in ranks)
    assert not [name for name in tensors_of(tmp_path / "plain") if name.endswith(".lr_pivots")]


def test_rounding_to_bf16_costs_at_most_twice_what_plain_factors_lose(compressed):
    _, plain = compressed("plain", gauge="plain")
    tensors, half = tensors_of(plain), torch.bfloat16
    for name in quantization(plain)["ranks"]:
        A, B = tensors[f"{name}.lr_A"].double(), tensors[f"{name}.lr_B"].double()
        part = rounded(to_pivot(A, B), half)
        pivot = part.A.double(), pivot_rows(part.C.double(), part.permutation)
        halved = A.to(half).double(), B.to(half).double()
        errors = [float((b @ a - B @ A).norm()) for a, b in (pivot, halved)]
        assert errors[0] <= 2 * errors[1], name


def test_saved_again_and_loaded_with_automodel(compressed, tmp_path):
    _, out = compressed()
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(out), tensors_of(tmp_path / "again")
    names = [name for name in before if not name.endswith("down_proj")]
    assert set(names) <= set(after)
    assert all(torch.equal(before[name], after[name]) for name in names)
    half = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert {b.dtype for n, b in half.named_buffers() if n.endswith("_order")} == {torch.int32}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_resumed_run_ends_with_the_same_bits(compressed):
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "block 1 train":
            raise KeyboardInterrupt

    options = {"strategy": "uniform", "gauge": "pivot", "preset": "default"}
    with pytest.raises(KeyboardInterrupt):
        compressed("stopped", progress=stop, **options)
    _, out = compressed("stopped", **options)
    _, whole = compressed("whole", **options)
    files = list(whole.glob("*.safetensors"))
    assert files
    for file in files:
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_engine_continues_as_generate_does(compressed, tokenizer, device):
    _, out = compressed()
    engine = LocalEngine(out, device=str(device), max_batch=2)
    engine.start()
    heard = Heard()
    engine.submit(tokenizer("the cat sat on")["input_ids"], greedy(8), heard)
    heard.finished()
    engine.stop()
    ids = heard.ids
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    text = lillama.generate(out, "the cat sat on", max_new_tokens=8, device=str(device))
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_marks_that_do_not_fit_the_rank_are_named(compressed, tmp_path):
    _, out = compressed()
    tensors = tensors_of(out)
    name = next(key for key in tensors if key.endswith("experts.1.w1.lr_pivots"))
    N = len(tensors[name])
    rank = int(tensors[name].sum())
    tensors[name][0] ^= 1
    (tmp_path / "config.json").write_text((out / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"{name} must be 1 for {rank} of {N} outputs and 0"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{name} must be 1 for {rank} of {N} outputs and 0"):
        export(tmp_path, tmp_path / "new", format="plain")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"missing factors: {name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_plain_experts_compute_the_same(compressed, device):
    """What takes the place of the module where a CUDA graph is captured."""
    _, out = compressed()
    model = load_model(out, device)
    module = next(m for m in model.modules() if isinstance(m, PivotLowRankExperts))
    x = torch.randn(9, module.hidden_dim, generator=torch.Generator().manual_seed(0)).to(device)
    weight, index = torch.rand(9, module.num_experts).softmax(-1).topk(2)
    args = x, index.to(device), weight.to(device)
    block = SimpleNamespace(experts=module)
    plain = expand_pivots(block)
    assert type(plain) is LowRankExperts and block.experts is plain is expand_pivots(block)
    torch.testing.assert_close(plain(*args), module(*args))
