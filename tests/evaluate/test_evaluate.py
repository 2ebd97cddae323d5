"""eval: every figure against an independent computation."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import lillama
from lillama.errors import InputError, RunError
from lillama.evaluate.evaluate import stored_size

KINDS = ["mixtral", "mamba"]
T = 48


@pytest.fixture(scope="module")
def short_text(tmp_path_factory, text_file: Path) -> Path:
    """About 2,000 tokens with characters of several bytes; not a multiple of T."""
    path = tmp_path_factory.mktemp("eval") / "held_out.txt"
    path.write_text(text_file.read_text("utf-8")[:4000] + "\u00e9\u4e16\u754c done", "utf-8")
    return path


@torch.no_grad()
def by_hand(model_path: Path, base_path: Path, text: Path, tokenizer) -> dict[str, float]:
    """Block by block with the models' own loss; KL and agreement from whole distributions."""
    model, base = (AutoModelForCausalLM.from_pretrained(p).float() for p in (model_path, base_path))
    content = text.read_text("utf-8")
    ids = tokenizer(content)["input_ids"]
    nll = base_nll = kl = agree = 0.0
    predicted = 0
    for start in range(0, len(ids), T):
        block = torch.tensor([ids[start : start + T]])
        n = block.shape[1] - 1
        if n < 1:
            continue
        ours, theirs = model(block, labels=block), base(block, labels=block)
        nll, base_nll = nll + float(ours.loss) * n, base_nll + float(theirs.loss) * n
        p = F.softmax(theirs.logits[0, :-1].double(), -1)
        q = F.softmax(ours.logits[0, :-1].double(), -1)
        kl += float((p * (p / q).log()).sum())
        agree += float((p.argmax(-1) == q.argmax(-1)).sum())
        predicted += n
    return {
        "perplexity": math.exp(nll / predicted),
        "base_perplexity": math.exp(base_nll / predicted),
        "bits_per_byte": nll / predicted / math.log(2) * len(ids) / len(content.encode()),
        "tokens": predicted,
        "kl": kl / predicted,
        "top1_agreement": agree / predicted,
        "retained": math.exp((base_nll - nll) / predicted),
    }


def other_checkpoint(kind: str, make_checkpoint) -> Path:
    """The same architecture with other weights: a bad compression of the fixture."""

    def edit(model):
        torch.manual_seed(7)
        for name, parameter in model.named_parameters():
            if "proj" in name or "embed" in name:
                parameter.data += 0.3 * parameter.data.std() * torch.randn_like(parameter)

    return make_checkpoint(kind, edit=edit)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_equals_a_computation_by_hand(
    kind, request, make_checkpoint, short_text, tokenizer, device
):
    base, model = request.getfixturevalue(kind), other_checkpoint(kind, make_checkpoint)
    wanted = by_hand(model, base, short_text, tokenizer)
    options = {"seq_len": T, "device": str(device), "dtype": "float32"}
    report = lillama.eval(model, short_text, against=base, **options)
    for key, value in wanted.items():
        assert report[key] == pytest.approx(value, rel=1e-4), key
    assert wanted["kl"] > 1e-3 and wanted["top1_agreement"] < 1, "the models differ"
    alone = lillama.eval(model, short_text, **options)
    keys = {"metric", "perplexity", "bits_per_byte", "tokens", "params", "bytes"}
    assert alone == {key: report[key] for key in keys}
    assert report.keys() >= keys | {"base_perplexity", "retained", "kl", "top1_agreement"}


@pytest.mark.parametrize("kind", KINDS)
def test_eval_against_itself_retains_everything(kind, request, short_text, device):
    path = request.getfixturevalue(kind)
    report = lillama.eval(path, short_text, against=path, seq_len=T, device=str(device))
    assert report["retained"] == 1 and report["top1_agreement"] == 1
    assert report["kl"] == pytest.approx(0, abs=1e-7)
    assert report["base_bits_per_byte"] == report["bits_per_byte"]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_eval_does_not_depend_on_the_batch_size(batch_size, mamba, short_text, device):
    options = {"seq_len": T, "device": str(device)}
    wanted = lillama.eval(mamba, short_text, **options)
    found = lillama.eval(mamba, short_text, batch_size=batch_size, **options)
    assert found.pop("metric") == wanted.pop("metric") == "blocks"
    assert found == pytest.approx(wanted, rel=1e-5)


def test_eval_counts_the_tail_and_progress_reaches_the_total(mamba, short_text, tokenizer, device):
    calls = []
    report = lillama.eval(
        mamba,
        [short_text],
        seq_len=T,
        device=str(device),
        progress=lambda *call: calls.append(call),
    )
    num_tokens = len(tokenizer(short_text.read_text("utf-8"))["input_ids"])
    full, rest = divmod(num_tokens, T)
    assert rest >= 2, "the case this test is about"
    assert report["tokens"] == full * (T - 1) + rest - 1
    assert calls[-1] == ("eval", num_tokens, num_tokens)


def test_eval_text_shorter_than_a_block_is_measured(mamba, tmp_path, device):
    text = tmp_path / "short.txt"
    text.write_text("the cat sat on a mat")
    report = lillama.eval(mamba, text, device=str(device))
    assert 2 <= report["tokens"] <= 20 and report["perplexity"] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_eval_size_of_a_compressed_model_is_the_reports(
    kind, dtype, make_checkpoint, text_file, tmp_path, device
):
    path = make_checkpoint(kind, dtype)
    out = tmp_path / "out"
    made = lillama.compress(
        path,
        out,
        reduction=0.2,
        text=text_file,
        tokens=300,
        seq_len=32,
        train=False,
        device=str(device),
    )
    assert stored_size(out) == (made["params_after"], made["bytes_after"])
    assert stored_size(path) == (made["params_before"], made["bytes_before"])
    # saved again by transformers (its sentinel looks different), the size is the same
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(again)
    assert stored_size(again) == (made["params_after"], made["bytes_after"])


def test_eval_base_with_another_vocabulary_is_refused(mamba, make_checkpoint, short_text):
    other = make_checkpoint("mamba", vocab_size=310)
    with pytest.raises(InputError, match="--against has a vocabulary of 310, MODEL of 300"):
        lillama.eval(mamba, short_text, against=other)


def test_eval_tokenizer_of_another_model_is_refused(make_checkpoint, short_text):
    with pytest.raises(InputError, match="the model has 100; they do not belong together"):
        lillama.eval(make_checkpoint("mamba", vocab_size=100), short_text)


def with_nan(make_checkpoint) -> Path:
    def edit(model):
        next(model.parameters()).data[:] = float("nan")

    return make_checkpoint("mamba", edit=edit)


def test_eval_broken_model_is_an_error_not_a_figure(make_checkpoint, short_text):
    with pytest.raises(RunError, match=r"the loss of MODEL became nan within the first \d+ tokens"):
        lillama.eval(with_nan(make_checkpoint), short_text)


def test_eval_broken_base_is_an_error_not_a_figure(mamba, make_checkpoint, short_text):
    with pytest.raises(RunError, match="the loss of --against became nan"):
        lillama.eval(mamba, short_text, against=with_nan(make_checkpoint))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "--seq-len must be at least 2, got 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"dtype": "half"}, "--dtype must be one of"),
        ({"device": "gpu"}, "--device must be"),
        ({"text": []}, "give at least one --text FILE"),
    ],
)
def test_eval_refuses_values_out_of_range(options, message, mamba, short_text):
    with pytest.raises(InputError) as caught:
        lillama.eval(mamba, **{"text": short_text, **options})
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_checkpoint_without_a_tensor_is_refused(kind, request, tmp_path, short_text):
    """transformers would fill it with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    path = request.getfixturevalue(kind)
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    name = next(n for n in tensors if ".1." in n and n.endswith(("q_proj.weight", "A_log")))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=name):
        lillama.eval(tmp_path, short_text)
