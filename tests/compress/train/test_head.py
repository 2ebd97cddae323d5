"""The factorised output head as a last block that is trained."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lillama
from lillama.checkpoint.gauge import LARGEST, plain_tensors
from lillama.compress.teacher.activations import stored
from lillama.compress.teacher.blocks import TeacherBlocks
from lillama.compress.train.block_inputs import HeadInputs
from lillama.compress.train.finetune import divergence
from lillama.compress.train.head import HeadTrainer
from lillama.compress.train.outside import Outside
from lillama.config import PRESETS
from lillama.errors import RunError
from lillama.models.config_json import read_config
from lillama.models.families import family_of

UNTIED = {"tie_word_embeddings": False}
TARGETS = {
    "mixtral": ("w1", "w2", "w3", "embed_tokens", "lm_head"),
    "mamba": ("in_proj", "out_proj", "embeddings", "lm_head"),
}
OPTIONS = {"reduction": 0.45, "tokens": 3000, "seq_len": 32, "device": "cpu"}
ROWS, T = 12, 16


@pytest.fixture(params=["mixtral", "mamba"])
def teacher(request, make_checkpoint, device):
    path = make_checkpoint(request.param, **UNTIED)
    config = read_config(path)
    return TeacherBlocks(path, config, family_of(config.model_type), device, torch.float32)


def streams(teacher, masked: bool) -> HeadInputs:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, T, teacher.model.config.hidden_size, generator=generator)
    other = hidden + 0.3 * torch.randn(hidden.shape, generator=generator)
    mask = torch.rand(ROWS, T, generator=generator) < 0.8 if masked else None
    return HeadInputs(stored(hidden), stored(other), mask)


def trainer_of(teacher, rank: int = 8, **changes) -> HeadTrainer:
    runtime = teacher.runtime["lm_head.weight"]
    weight = teacher.read("lm_head.weight").double()
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    factors = V[:rank], U[:, :rank] * S[:rank]
    norm = next(n for n in teacher.runtime if n.endswith(("model.norm.weight", "norm_f.weight")))
    recipe = PRESETS["default"].__class__(
        **{**{f: getattr(PRESETS["default"], f) for f in PRESETS["default"].__slots__}, **changes}
    )
    return HeadTrainer(
        teacher, runtime, factors, {teacher.runtime[norm]: teacher.read(norm)}, recipe, 0
    )


@pytest.mark.parametrize("masked", [False, True], ids=["packed", "padded"])
def test_gradients_of_a_batch_are_those_of_autograd(teacher, masked, device):
    """Sequence by sequence through the product, against all at once through the factors."""
    stream, rows = streams(teacher, masked), torch.tensor([3, 0, 7])
    trainer = trainer_of(teacher, gradient_clip=None)
    found: list[torch.Tensor] = []
    trainer.optimizer.step = lambda: found.extend(p.grad.clone() for p in trainer.parameters)
    with teacher.head():
        trainer.step(stream, rows, 1e-3)
        mask = None if stream.mask is None else stream.mask[rows].to(device)
        weights = {trainer.head: trainer.B @ trainer.A, **trainer.vectors}
        ours = teacher.logits(stream.student.read(rows).to(device), mask, weights)
        with torch.no_grad():
            theirs = teacher.logits(stream.teacher.read(rows).to(device), mask)
        loss = divergence(ours, theirs, mask) / stream.tokens(rows)
        expected = torch.autograd.grad(loss, trainer.parameters)
    close = {"rtol": 1e-3, "atol": 1e-6} if device.type == "cpu" else {"rtol": 0.1, "atol": 1e-3}
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert float(other.abs().max()) > 0
        torch.testing.assert_close(one, other, **close)


def test_training_lowers_the_divergence_and_keeps_the_best(teacher):
    train, held_out = streams(teacher, False), streams(teacher, True)
    trainer, steps = trainer_of(teacher, batch_size=4, learning_rate=1e-3), []
    with teacher.head():
        report = trainer.train(train, held_out, steps.append)
        assert report["held_out_kl_after"] < report["held_out_kl_before"]
        assert report["held_out_kl_after"] == pytest.approx(trainer.judge(held_out), rel=1e-4)
    assert steps == [4, 4, 4] and report["steps"] == 3 and report["best_step"] > 0


def test_a_harmful_rate_leaves_the_start(teacher):
    trainer = trainer_of(teacher, rank=24, learning_rate=10.0, gradient_clip=None)
    start = [parameter.detach().clone() for parameter in trainer.parameters]
    with teacher.head():
        report = trainer.train(streams(teacher, False), streams(teacher, False), lambda rows: None)
    assert report["best_step"] == 0
    assert report["held_out_kl_after"] == report["held_out_kl_before"]
    assert all(a.equal(b) for a, b in zip(start, trainer.parameters, strict=True))


def test_nan_names_the_head(teacher):
    trainer = trainer_of(teacher)
    trainer.A.data[0, 0] = float("nan")
    with teacher.head(), pytest.raises(RunError, match="of the output head became nan"):
        trainer.judge(streams(teacher, False))


@pytest.mark.parametrize(("kind", "gauge"), [("mixtral", "pivot"), ("mamba", "plain")])
def test_the_trained_head_is_what_is_loaded(
    kind, gauge, make_checkpoint, text_file, tmp_path, monkeypatch, device
):
    base, out = make_checkpoint(kind, **UNTIED), tmp_path / "out"
    trained: dict[str, torch.Tensor] = {}
    products: list[torch.Tensor] = []
    train_head, train = Outside.train_head, HeadTrainer.train

    def spied(*args):
        found, report = train_head(*args)
        trained.update(found)
        return found, report

    def watched(trainer, *args):
        report = train(trainer, *args)
        products.append((trainer.B.double() @ trainer.A.double()).detach().cpu())
        return report

    monkeypatch.setattr(Outside, "train_head", spied)
    monkeypatch.setattr(HeadTrainer, "train", watched)
    given = {**OPTIONS, "text": text_file, "targets": TARGETS[kind], "device": str(device)}
    given["gauge"] = gauge
    report = lillama.compress(base, out, **given)
    head = report["head"]
    assert head["held_out_kl_after"] < head["held_out_kl_before"] and head["best_step"] > 0
    assert json.loads((out / "report.json").read_text("utf-8"))["head"] == head
    stored_tensors: dict[str, torch.Tensor] = {}
    for shard in out.glob("*.safetensors"):
        stored_tensors |= load_file(shard)
    ends = ("lr_A", "lr_B") if gauge == "plain" else ("lr_A", "lr_C", "lr_pivots")
    assert {f"lm_head.{end}" for end in ends} < trained.keys() and len(trained) == len(ends) + 1
    for name, value in trained.items():
        assert value.cpu().to(stored_tensors[name].dtype).equal(stored_tensors[name]), name
    # the trained product, up to the rounding of what is stored
    A, B = plain_tensors({end: stored_tensors[f"lm_head.{end}"] for end in ends})
    found = B.double() @ A.double()
    assert float((found - products[0]).norm() / products[0].norm()) < 1e-5
    assert ("pivot_largest" in head) == (gauge == "pivot")
    assert 0 <= head.get("pivot_largest", 0) <= LARGEST
    model, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (out, base))
    norm = next(name for name in trained if "norm" in name)
    changed = model.state_dict()[norm.replace("lm_head.", "")]
    assert not changed.equal(dense.state_dict()[norm])
    untrained = lillama.compress(base, tmp_path / "plain", **given, train=False)
    assert "head" not in untrained


def test_a_run_killed_in_the_head_ends_the_same(make_checkpoint, text_file, tmp_path, monkeypatch):
    base = make_checkpoint("mamba", **UNTIED)
    given = {**OPTIONS, "text": text_file, "targets": TARGETS["mamba"]}
    lillama.compress(base, tmp_path / "whole", **given)

    def killed(*_):
        raise RunError("the run was stopped")

    with monkeypatch.context() as patch:
        patch.setattr(HeadTrainer, "train", killed)
        with pytest.raises(RunError, match="the same command goes on from there"):
            lillama.compress(base, tmp_path / "out", **given)
    lillama.compress(base, tmp_path / "out", **given)
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        one, other = load_file(shard), load_file(tmp_path / "out" / shard.name)
        assert one.keys() == other.keys()
        assert all(value.equal(other[name]) for name, value in one.items())
