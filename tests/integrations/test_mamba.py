"""fast_mamba against transformers' own Mamba path, and that it leaves nothing behind."""

import importlib.util
import threading

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mamba import modeling_mamba

import lillama.integrations.mamba as integration
from lillama.integrations.mamba import fast_mamba

NAMES = (
    "mamba_selective_scan",
    "mamba_selective_state_update",
    "causal_conv1d_fn",
    "causal_conv1d_update",
)
LOW_RANK = {
    f"backbone.layers.{n}.mixer.{p}": 8 for n in (0, 1) for p in ("in_proj", "x_proj", "out_proj")
}


@pytest.fixture(autouse=True)
def _fast_mamba():
    """These tests switch themselves: the fixture of this name for all tests would be in the way."""


def globals_now() -> dict[str, object]:
    return {name: getattr(modeling_mamba, name) for name in NAMES}


ORIGINAL = globals_now()


def tokens(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two rows of 13 tokens, the second padded on the left."""
    ids = torch.randint(1, 300, (2, 13), generator=torch.Generator().manual_seed(3)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def run(model: PreTrainedModel, device: torch.device) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter for a random gradient of the logits."""
    ids, mask = tokens(device)
    model.zero_grad()
    logits = model(ids, attention_mask=mask).logits
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    logits.backward(grad.to(device, logits.dtype))
    gradients = {f"grad {name}": p.grad.clone() for name, p in model.named_parameters()}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("low_rank", [True, False], ids=["low-rank", "dense"])
def test_fast_mamba_logits_and_gradients_equal_transformers(
    make_model, make_low_rank, device, low_rank, training
):
    if low_rank:
        model = make_low_rank("mamba", LOW_RANK, use_bias=True)
    else:
        model = make_model("mamba", use_bias=True)
    model = model.to(device).train(training)
    wanted = run(model, device)
    with fast_mamba():
        actual = run(model, device)
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.any(), name
        error = float((actual[name] - tensor).abs().max() / tensor.abs().max())
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_fast_mamba_bf16_is_as_close_to_fp32_as_transformers(make_model, device):
    model = make_model("mamba", torch.bfloat16).to(device)
    ids, _ = tokens(device)
    with torch.no_grad():
        theirs = model(ids).logits.float()
        with fast_mamba():
            ours = model(ids).logits
        truth = model.float()(ids).logits
    eps = torch.finfo(torch.bfloat16).eps * float(truth.abs().max())
    allowed = 2 * (float((theirs - truth).abs().max()) + eps)
    assert float((ours.float() - truth).abs().max()) <= allowed


@pytest.mark.parametrize("low_rank", [True, False], ids=["low-rank", "dense"])
def test_fast_mamba_generates_the_same_tokens(make_model, make_low_rank, device, low_rank):
    model = make_low_rank("mamba", LOW_RANK) if low_rank else make_model("mamba")
    model = model.to(device)
    ids, mask = tokens(device)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    wanted = model.generate(ids, attention_mask=mask, **options)
    with fast_mamba():
        actual = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(actual.sequences, wanted.sequences)
    assert actual.sequences.shape == (2, 25)
    # the scan's last state carries into every later step
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(wanted.logits))


def test_fast_mamba_runs_our_ops_inside_only(make_model, monkeypatch):
    calls = []
    for name in ("selective_scan", "causal_conv1d"):
        ours = getattr(integration, name)
        monkeypatch.setattr(
            integration, name, lambda *a, n=name, f=ours, **k: calls.append(n) or f(*a, **k)
        )
    model = make_model("mamba")
    model(torch.tensor([[1, 2, 3]]))
    assert calls == []
    with fast_mamba():
        model(torch.tensor([[1, 2, 3]]))
    assert sorted(calls) == ["causal_conv1d"] * 2 + ["selective_scan"] * 2
    model(torch.tensor([[1, 2, 3]]))
    assert len(calls) == 4


def test_fast_mamba_puts_the_functions_back():
    assert globals_now() == ORIGINAL
    with fast_mamba():
        inside = globals_now()
        assert all(inside[name] is not ORIGINAL[name] for name in NAMES)
    assert globals_now() == ORIGINAL


def test_fast_mamba_puts_the_functions_back_after_an_exception():
    with pytest.raises(KeyboardInterrupt), fast_mamba():
        raise KeyboardInterrupt
    assert globals_now() == ORIGINAL


def test_fast_mamba_nested():
    with fast_mamba():
        outer = globals_now()
        with fast_mamba():
            pass
        assert globals_now() == outer
        with pytest.raises(ValueError), fast_mamba():
            raise ValueError
        assert globals_now() == outer
    assert globals_now() == ORIGINAL


def test_fast_mamba_of_two_threads_that_leave_out_of_order():
    forward = modeling_mamba.MambaMixer.forward
    left, second = threading.Event(), threading.Event()

    def other() -> None:
        with fast_mamba():
            second.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with fast_mamba():
        inside = globals_now()
        thread.start()
        assert second.wait(10)
    assert globals_now() == inside, "one of them is still in there"
    left.set()
    thread.join()
    assert globals_now() == ORIGINAL and modeling_mamba.MambaMixer.forward is forward


@pytest.mark.parametrize(
    ("package", "kept"),
    [("mamba_ssm", NAMES[:2]), ("causal_conv1d", NAMES[2:])],
)
def test_fast_mamba_leaves_an_installed_package_alone(monkeypatch, package, kept):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == package else find_spec(name)
    )
    with fast_mamba():
        inside = globals_now()
    for name in NAMES:
        assert (inside[name] is ORIGINAL[name]) == (name in kept)
    assert globals_now() == ORIGINAL


def test_fast_mamba_refuses_packed_sequences():
    x = torch.zeros(1, 4, 5)
    with fast_mamba(), pytest.raises(NotImplementedError, match="seq_idx"):
        modeling_mamba.causal_conv1d_fn(x, torch.zeros(4, 2), seq_idx=torch.zeros(1, 5))
