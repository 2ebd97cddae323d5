"""End-to-end training of a compressed model: closer to its base, same ranks, whole or not there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lillama
from lillama.compress.train.finetune import _Finetuning, divergence
from lillama.config import FinetuneConfig
from lillama.data.sequences import TokenBlocks, held_out_blocks
from lillama.errors import InputError, RunError
from lillama.integrations.loading import load_model

OPTIONS = {"tokens": 1500, "seq_len": 32, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def compressed(mixtral, mamba, text_file, tmp_path_factory):
    """{kind: (base, OUT)}, untrained at 30 and 25%; the Mamba in the pivot gauge, and another
    Mixtral with its embeddings and head."""
    found = {}
    plain, pivot = {"gauge": "plain", "reduction": 0.3}, {"gauge": "pivot"}
    # as small as these three can be, so that each of them has a rank
    targets = ("w1", "embed_tokens", "lm_head")
    most = lillama.plan(mixtral, 0.01, targets=targets)["max_reduction"]
    vocabulary = pivot | {"targets": targets, "reduction": 0.95 * most}
    for kind, base, options in (
        ("mixtral", mixtral, plain),
        ("mamba", mamba, pivot),
        ("mixtral-pivot", mixtral, vocabulary),
    ):
        out = tmp_path_factory.mktemp("compressed") / kind
        given = {"reduction": 0.25, "text": text_file, "tokens": 600, "seq_len": 32, **options}
        lillama.compress(base, out, preset="fast", device="cpu", **given)
        found[kind] = base, out
    return found


def test_a_first_token_without_embedding_leaves_a_step_to_the_others(
    make_checkpoint, text_file, tmp_path
):
    """Each norm multiplies its gradient, and that of the embedding's factors would be clipped to
    nothing together with all others."""
    base, out = make_checkpoint("mixtral", num_hidden_layers=4), tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_input_embeddings().weight.data[0] = 0.0
    model.save_pretrained(base)
    targets = ("w1", "embed_tokens", "lm_head")
    most = lillama.plan(base, 0.01, targets=targets, gauge="plain")["max_reduction"]
    given = {"targets": targets, "gauge": "plain", "reduction": 0.95 * most, "tokens": 600}
    lillama.compress(base, out, text=text_file, preset="fast", device="cpu", seq_len=32, **given)
    models = [load_model(path, torch.device("cpu"), "float32") for path in (out, base)]
    first = models[0](torch.tensor([[0]]), output_hidden_states=True).hidden_states[0]
    assert float(first.detach().abs().max()) < 1e-12
    options = FinetuneConfig(model=out, out=tmp_path / "better", base=base, text=(text_file,))
    run = _Finetuning(models[0], models[1].requires_grad_(False), options)

    def gradient_norm(ids) -> float:
        run.student.zero_grad()
        loss, tokens = run.loss(TokenBlocks(ids, None), torch.arange(len(ids)))
        (loss / tokens).backward()
        return float(torch.nn.utils.get_total_norm([p.grad for p in run.trained.values()]))

    ids = torch.randint(1, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    ordinary = gradient_norm(ids)
    assert int(run.left_out) == 0
    ids[3, 0] = 0
    assert gradient_norm(ids) < 20 * ordinary and int(run.left_out) > 0


def kl(model, base, ids) -> float:
    with torch.no_grad():
        return float(divergence(model(ids).logits, base(ids).logits, None)) / ids.numel()


@pytest.mark.parametrize("kind", ["mixtral", "mamba", "mixtral-pivot"])
def test_finetune_brings_the_model_closer(
    kind, compressed, text_file, short_text, tokenizer, tmp_path, device
):
    base, model = compressed[kind]
    better, calls = tmp_path / "better", []
    options = {**OPTIONS, "tokens": 16_000}
    report = lillama.finetune(
        model, better, base=base, text=text_file, device=str(device),
        progress=lambda *call: calls.append(call), **options,
    )  # fmt: skip
    assert report["kl_after"] < 0.98 * report["kl_before"] and report["best_step"] > 0
    assert calls[-1][1] == calls[-1][2] and report["tokens"] >= 16_000
    read = lambda path: json.loads((path / "config.json").read_text())["quantization_config"]  # noqa: E731
    assert read(better)["ranks"] == read(model)["ranks"]
    assert read(better)["gauge"] == read(model)["gauge"]
    names = {path.name for path in better.iterdir()}
    assert names >= {"finetune.json", "tokenizer.json", "recipe.json", "README.md"}
    assert json.loads((better / "finetune.json").read_text())["learning_rate"] == 1e-3
    assert not (tmp_path / "better.unfinished").exists()
    # what is on disk is what was measured
    words = tokenizer.encode(text_file.read_text("utf-8"))[:512]
    ids = torch.tensor(words).view(-1, 32)
    loaded = [AutoModelForCausalLM.from_pretrained(path) for path in (base, model, better)]
    assert kl(loaded[2], loaded[0], ids) < kl(loaded[1], loaded[0], ids)
    for part, first in (("get_input_embeddings", "lr_B"), ("get_output_embeddings", "lr_A")):
        before, after = (dict(getattr(m, part)().named_parameters()) for m in loaded[1:])
        if kind == "mixtral-pivot":
            assert before.keys() == {first, "lr_C"}
        for name, value in before.items():  # factors learn, whole matrices stay
            assert torch.equal(value, after[name]) == (name == "weight")
    sizes = [
        lillama.eval(path, short_text, seq_len=64, device=str(device)) for path in (model, better)
    ]
    assert sizes[0]["params"] == sizes[1]["params"]


def test_the_rate_follows_the_divergence(compressed, text_file, tmp_path):
    base, model = compressed["mamba"]
    options = {**OPTIONS, "learning_rate": None, "tokens": 300}
    report = lillama.finetune(model, tmp_path / "out", base=base, text=text_file, device="cpu",
                              **options)  # fmt: skip
    width = json.loads((base / "config.json").read_text())["hidden_size"]
    expected = 1.8e-3 * (report["kl_before"] * 128 / width) ** 0.5
    assert report["learning_rate"] == pytest.approx(expected) and 0 < report["kl_before"] < 1
    recorded = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert recorded["learning_rate"] == report["learning_rate"]


def test_the_start_is_kept_where_training_harms(compressed, text_file, tmp_path):
    base, model = compressed["mamba"]
    report = lillama.finetune(
        model, tmp_path / "out", base=base, text=text_file, device="cpu",
        **{**OPTIONS, "learning_rate": 2.0, "tokens": 300},
    )  # fmt: skip
    assert report["best_step"] == 0 and report["kl_after"] == report["kl_before"]


def test_finetune_also_learns_from_what_the_base_writes(compressed, text_file, tmp_path):
    base, model = compressed["mamba"]
    out, own = tmp_path / "out", tmp_path / "out.own.jsonl"
    given = {**OPTIONS, "base": base, "text": text_file, "device": "cpu", "own_tokens": 900}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "finetune":
            raise RunError("stopped")

    with pytest.raises(RunError, match="stopped"):
        lillama.finetune(model, out, progress=stop, **given)
    assert [path.name for path in tmp_path.iterdir()] == [own.name]
    with pytest.raises(InputError, match=r"out\.own\.jsonl is not of this command; delete it"):
        lillama.finetune(model, out, **given, seed=1)
    stages = []
    found = lillama.finetune(model, out, progress=lambda *call: stages.append(call[0]), **given)
    assert set(stages) == {"finetune"} and not own.exists()  # what was written was taken
    # whole blocks of 32 of both
    assert found["tokens"] == 32 * (-(-1500 // 32) + -(-900 // 32)) and found["steps"] == 10
    # the text is the base's own, of the next seed, and the model is judged on both
    counts = [held_out_blocks(tokens, 32) for tokens in (1500, 900)]
    written = tmp_path / "written.jsonl"
    tokens = 900 + 32 * (counts[1] + 2)
    lillama.sample(base, written, tokens=tokens, seq_len=32, seed=1, device="cpu")
    before = [
        lillama.finetune(model, tmp_path / name, **{**given, **more, "own_tokens": 0})["kl_before"]
        for name, more in (("a", {}), ("b", {"text": written, "tokens": 900}))
    ]
    mean = sum(n * loss for n, loss in zip(counts, before, strict=True)) / sum(counts)
    assert found["kl_before"] == pytest.approx(mean) and before[0] != pytest.approx(before[1])


def test_divergence_is_the_mean_kl_of_the_counted_tokens():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    p, q = b.double().softmax(-1), a.double().softmax(-1)
    rows = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(divergence(a, b, mask).double(), rows[mask].sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(divergence(a, b, None).double(), rows.sum(), rtol=1e-5, atol=0)
    assert float(divergence(a, a, None)) == 0


def test_finetune_interrupted_leaves_nothing(compressed, text_file, tmp_path):
    import signal

    base, model = compressed["mamba"]

    def progress(stage: str, done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(RunError, match="interrupted"):
        lillama.finetune(
            model, tmp_path / "out", base=base, text=text_file, device="cpu", progress=progress,
            **OPTIONS,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_finetune_refuses_what_cannot_be(compressed, text_file, tmp_path):
    base, model = compressed["mamba"]
    other = compressed["mixtral"][0]
    out = tmp_path / "out"
    cases = [
        ((base, out, base), {}, "is not compressed by lillama; compress it first"),
        ((model, out, model), {}, "is itself compressed; give the dense base model"),
        ((model, tmp_path, base), {}, "exists; choose another OUT"),
        ((model, tmp_path / "a" / "b", base), {}, "does not exist; create it first"),
        ((model, out, base), {"learning_rate": 0.0}, "--learning-rate must be a finite number > 0"),
        ((model, out, tmp_path / "none"), {}, "is not a checkpoint folder"),
    ]
    for (source, target, dense), options, message in cases:
        with pytest.raises(InputError, match=message):
            lillama.finetune(source, target, base=dense, text=text_file, **{**OPTIONS, **options})
    assert other != base and not out.exists()


def test_a_failed_exchange_puts_the_old_model_back(compressed, text_file, tmp_path, monkeypatch):
    base, model = compressed["mamba"]
    out = tmp_path / "out"
    shutil.copytree(model, out)
    report = json.loads((model / "report.json").read_text("utf-8"))
    given = {**OPTIONS, "tokens": 300, "device": "cpu", "overwrite": True, "text": text_file}
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "out.unfinished":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(RunError, match="cannot write .*out"):
            lillama.finetune(out, out, base=base, **given)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((out / "report.json").read_text("utf-8")) == report
    found = lillama.finetune(out, out, base=base, **given)
    after = json.loads((out / "report.json").read_text("utf-8"))
    assert after["seconds"] == round(report["seconds"] + found["seconds"], 2)
    assert after["finetune"] == found
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
