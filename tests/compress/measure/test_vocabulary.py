"""Embeddings and output head as low-rank factors: what their ranks cost, and a model that has
them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import lillama
from lillama.checkpoint.gauge import LARGEST, plain_tensors
from lillama.compress.measure.gradients import GradientCollector
from lillama.compress.measure.svd import Moment
from lillama.compress.measure.vocabulary import (
    INFLATION,
    SHRINKAGE,
    embedding_sensitivity,
    head_sensitivity,
    vocabulary_factors,
)
from lillama.compress.plan.matrix import Matrix, moment_side
from lillama.config import PRESETS
from lillama.errors import InputError
from lillama.models.families import FAMILIES
from lillama.modules.low_rank_embedding import LowRankEmbedding, PivotLowRankEmbedding

RECIPE = PRESETS["default"]
SHARE = RECIPE.vocabulary_floor
# more tokens than dimensions, and the other way round
SIZES = [(48, 16), (16, 40)]
# Mamba's two share one matrix unless told
UNTIED = {"tie_word_embeddings": False}
VOCABULARY = {"mixtral": "embed_tokens,lm_head", "mamba": "embeddings,lm_head"}
LAYERS = {"mixtral": ("w1", "w2", "w3"), "mamba": ("in_proj", "out_proj")}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def best(H: Tensor, W: Tensor, C: Tensor, rank: int) -> tuple[Tensor, float]:
    """The definition: the product that leaves least of tr(H D C D^T) / 2, by symmetric roots."""

    def root(M: Tensor, power: float) -> Tensor:
        values, vectors = torch.linalg.eigh(M)
        return (vectors * values.clamp_min(1e-12).pow(power)) @ vectors.mT

    U, S, V = torch.linalg.svd(root(H, 0.5) @ W @ root(C, 0.5), full_matrices=False)
    W_best = root(H, -0.5) @ (U[:, :rank] * S[:rank]) @ V[:rank] @ root(C, -0.5)
    D = W - W_best
    return W_best, float(torch.trace(H @ D @ C @ D.mT)) / 2


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_head_factors_are_the_best_ones_and_the_loss_is_theirs(size):
    V, K = size
    W, x, g = random(V, K, seed=0), random(300, K, seed=1), random(300, V, seed=2)
    g = g * random(V, seed=3).abs()
    matrix = Matrix("lm_head", 2, V, K)

    class Seen(GradientCollector):
        def __init__(self) -> None:
            side = moment_side(V, K)
            gram, rows = (x.mT @ x, g @ W) if side == "input" else ((x @ W.mT).mT @ (x @ W.mT), g)
            self._found = {"lm_head": Moment(side, gram, 300.0, float(x.square().sum()))}
            moment = Moment(side, rows.mT @ rows, 300.0, float(g.square().sum()))
            self._gradients = {"lm_head": moment}

    found = head_sensitivity(matrix, W, Seen(), "lm_head", RECIPE)
    C = x.mT @ x / 300
    C = C + SHRINKAGE * x.square().mean() * torch.eye(K)
    H = (1 - SHARE) * g.mT @ g / 300 + SHARE * torch.eye(V) / V
    measured = {"lm_head.moment": found.moment, "lm_head.gradient": found.gradient}
    for rank, loss in zip(matrix.ranks, found.losses, strict=True):
        W_best, left = best(H, W, C, rank)
        assert loss / INFLATION == pytest.approx(left, rel=1e-6)
        factors = vocabulary_factors(matrix, W, rank, lambda name: measured[name])
        product = factors["lr_B"] @ factors["lr_A"]
        torch.testing.assert_close(product, W_best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_embedding_factors_are_the_best_ones_and_the_loss_is_theirs(size):
    V, K = size
    E, g = random(V, K, seed=0), random(300, K, seed=1) * random(K, seed=2).abs()
    ids = (torch.rand(300, generator=torch.Generator().manual_seed(3)) ** 3 * V).long()
    counts = torch.bincount(ids, minlength=V)
    matrix = Matrix("e", -1, V, K)
    found = embedding_sensitivity(matrix, E, counts, g.mT @ g, RECIPE)
    H = g.mT @ g / 300
    H = H + SHRINKAGE * H.diagonal().mean() * torch.eye(K)
    chances = (1 - SHARE) * counts.double() / 300 + SHARE / V
    measured = {"e.moment": found.moment, "e.gradient": found.gradient}
    for rank, loss in zip(matrix.ranks, found.losses, strict=True):
        W_best, left = best(H, E.mT, torch.diag(chances), rank)
        assert loss / INFLATION == pytest.approx(left, rel=1e-6)
        factors = vocabulary_factors(matrix, E, rank, lambda name: measured[name])
        assert factors["lr_A"].shape == (rank, K) and factors["lr_B"].shape == (V, rank)
        product = factors["lr_B"] @ factors["lr_A"]
        torch.testing.assert_close(product, W_best.mT, rtol=1e-3, atol=1e-3)


def compressed(kind, make_checkpoint, tmp_path, text_file, device, targets, **options):
    """Nearly as small as it can be, so that every target has a rank."""
    path, out = make_checkpoint(kind, **UNTIED), tmp_path / "out"
    reduction = 0.95 * lillama.plan(path, 0.01, targets=tuple(targets))["max_reduction"]
    report = lillama.compress(
        path, out, reduction=reduction, text=text_file, tokens=600, seq_len=32, device=str(device),
        targets=tuple(targets), **options,
    )  # fmt: skip
    return path, out, report


def ranks_of(out) -> dict[str, int]:
    return json.loads((out / "config.json").read_text())["quantization_config"]["ranks"]


def stored_in(out: Path) -> dict[str, Tensor]:
    return {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("gauge", ["plain", "pivot"])
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_a_model_without_dense_vocabulary(
    kind, gauge, make_checkpoint, tmp_path, text_file, device
):
    """Both matrices alone: every block passes through, and the logits are those of the products."""
    path, out, report = compressed(
        kind,
        make_checkpoint,
        tmp_path,
        text_file,
        device,
        VOCABULARY[kind].split(","),
        preset="fast",
        gauge=gauge,
    )
    family = FAMILIES[kind]
    ranks = ranks_of(out)
    assert set(ranks) == {family.embedding, "lm_head"} and report["blocks"] == []
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    embeddings = model.get_input_embeddings()
    assert type(embeddings) is (LowRankEmbedding if gauge == "plain" else PivotLowRankEmbedding)
    tensors = stored_in(out)
    dense = AutoModelForCausalLM.from_pretrained(path).eval()
    assert sum(p.numel() for p in model.parameters()) == report["params_after"]
    for name in ranks:
        module = model.get_submodule(name)
        old = dense.get_submodule(name).get_parameter("weight")
        keys = [n for n in tensors if n.startswith(f"{name}.lr_")]
        A, B = plain_tensors({n.rpartition(".")[2]: tensors[n].double() for n in keys})
        product = (B @ A).float()
        assert module.weight.shape == old.shape and module.weight.device.type == "meta"
        assert not torch.allclose(product, old, atol=1e-3)
        old.data.copy_(product)
    ids = torch.randint(1, 300, (2, 9))
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    again = tmp_path / "again"
    model.save_pretrained(again)
    saved = AutoModelForCausalLM.from_pretrained(again).eval()
    assert torch.equal(saved(ids).logits, model(ids).logits)
    headless = AutoModel.from_pretrained(out).eval()
    hidden = headless(ids).last_hidden_state
    wanted = hidden @ dense.get_output_embeddings().weight.mT
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_vocabulary_in_the_pivot_gauge(kind, dtype, make_checkpoint, tmp_path, text_file, device):
    """What is stored: R columns of the table and R rows of the head as they are, a bounded C, the
    bytes that the plan counts; and more rank than in the plain gauge."""
    targets = VOCABULARY[kind].split(",")
    path, out, report = compressed(
        kind, make_checkpoint, tmp_path, text_file, device, targets, gauge="pivot", dtype=dtype,
        train=True,
    )  # fmt: skip
    tensors, ranks = stored_in(out), ranks_of(out)
    embedding = FAMILIES[kind].embedding
    numbers = places = 0
    for name, (V, H) in dict.fromkeys(ranks, (300, 32)).items():
        R, outputs = ranks[name], H if name == embedding else V
        wanted = {"lr_C": (outputs - R, R), "lr_pivots": (outputs,)}
        wanted |= {"lr_B": (V, R)} if name == embedding else {"lr_A": (R, H)}
        keys = [n for n in tensors if n.startswith(f"{name}.lr_")]
        assert {n.rpartition(".")[2]: tuple(tensors[n].shape) for n in keys} == wanted
        assert tensors[f"{name}.lr_pivots"].dtype == torch.uint8
        assert 0 < float(tensors[f"{name}.lr_C"].abs().max()) <= LARGEST * 1.01
        numbers += R * (V + H - R)
        places += outputs
    assert report["head"]["pivot_largest"] <= LARGEST
    saved = sum(300 * 32 for _ in ranks) - numbers
    assert report["params_before"] - report["params_after"] == saved
    item = getattr(torch, dtype).itemsize
    before = sum(t.nbytes for t in load_file(path / "model.safetensors").values())
    sentinel = f"{min(ranks, key=lambda n: (n == 'lm_head', n))}.weight"
    found = sum(t.nbytes for n, t in tensors.items() if n != sentinel)
    assert found == report["bytes_after"] == before // 4 * item - saved * item + places


def test_pivot_vocabulary_gets_more_rank_for_one_budget(make_checkpoint):
    path, H = make_checkpoint("mamba", hidden_size=128, **UNTIED), 128
    targets = ("embeddings", "lm_head")
    options = {"strategy": "uniform", "preset": "fast", "targets": targets}
    plain, pivot = (lillama.plan(path, 0.1, gauge=g, **options) for g in ("plain", "pivot"))
    rows = zip(plain["matrices"], pivot["matrices"], strict=True)
    assert all(8 < one["rank"] < other["rank"] for one, other in rows)
    for row in pivot["matrices"]:
        assert row["params_after"] == row["rank"] * (300 + H - row["rank"])
        outputs = 300 if row["name"] == "lm_head" else H
        assert row["bytes_after"] == 4 * row["params_after"] + outputs
    head, embedding = sorted(pivot["matrices"], key=lambda row: row["name"] != "lm_head")
    # a token reads one row of the table, and multiplies it
    lost = 300 * H - head["params_after"] - embedding["rank"] * (H - embedding["rank"])
    assert pivot["active_params_before"] - pivot["active_params_after"] == lost


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_blocks_are_trained_behind_the_students_own_embeddings(
    kind, make_checkpoint, tmp_path, text_file, short_text, device
):
    seen = []

    def spy(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))

    targets = (*LAYERS[kind], *VOCABULARY[kind].split(","))
    _, out, report = compressed(
        kind, make_checkpoint, tmp_path, text_file, device, targets, progress=spy
    )
    assert {"lm_head", FAMILIES[kind].embedding} < set(ranks_of(out))
    assert any(stage == "block 0 student" for stage, _, _ in seen)
    assert seen[-1][1] == seen[-1][2]  # every token was counted
    assert not list(out.glob("gradients-*"))
    assert (
        lillama.eval(out, short_text, seq_len=32, device=str(device))["params"]
        == (report["params_after"])
    )


def test_the_students_stream_begins_with_the_factors(make_checkpoint, tmp_path, text_file, device):
    """With an embedding that is almost gone, block 0's held-out loss on its input is not the
    teacher's."""
    options = {"text": text_file, "tokens": 600, "seq_len": 32, "device": str(device),
               "loss": "student"}  # fmt: skip
    mamba = make_checkpoint("mamba", **UNTIED)
    targets = ("embeddings", "in_proj")
    reduction = 0.95 * lillama.plan(mamba, 0.01, targets=targets)["max_reduction"]
    lillama.compress(mamba, tmp_path / "a", targets=targets, reduction=reduction, **options)
    tensors = stored_in(tmp_path / "a")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert "backbone.embeddings.lr_B" in tensors and report["blocks"][0]["index"] == 0
    reduction = 0.95 * lillama.plan(mamba, 0.01, targets=("in_proj",))["max_reduction"]
    lillama.compress(mamba, tmp_path / "b", targets=("in_proj",), reduction=reduction, **options)
    other = json.loads((tmp_path / "b" / "report.json").read_text())
    first, plain = report["blocks"][0], other["blocks"][0]
    assert first["held_out_loss_before"] != plain["held_out_loss_before"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "paper", "targets": ("lm_head",)}, "need a preset that measures gradients"),
        ({"preset": "whitened", "targets": ("w1", "embed_tokens")}, "got --preset whitened"),
    ],
    ids=str,
)
def test_presets_without_gradients_are_refused(options, message, mixtral, tmp_path, text_file):
    with pytest.raises(InputError, match=message):
        lillama.compress(mixtral, tmp_path / "out", reduction=0.1, text=text_file, **options)
    assert not (tmp_path / "out").exists()


def test_a_tied_matrix_is_refused_or_left_out(mamba, tmp_path, text_file):
    with pytest.raises(InputError, match="--targets lm_head: .* share one matrix"):
        lillama.compress(mamba, tmp_path / "out", reduction=0.1, text=text_file,
                         targets=("lm_head",))  # fmt: skip
    rows = lillama.plan(mamba, 0.1)["matrices"]
    assert rows and all(".layers." in row["name"] for row in rows)


@pytest.mark.parametrize("kind", [LowRankEmbedding, PivotLowRankEmbedding])
@pytest.mark.parametrize("rank", [0, 9])
def test_an_impossible_rank_of_an_embedding(rank, kind):
    with pytest.raises(ValueError, match="rank must be in 1"):
        kind(20, 8, rank)
