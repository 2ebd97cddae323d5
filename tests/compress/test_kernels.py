"""The engine on the Triton kernels gives what it gives on the reference: on the CPU, through the
interpreter, which rounds sums in another order and nothing more."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lillama_kernels import kernels_impl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lillama

OPS = ("distill_loss", "low_rank_linear")
TRITON = (
    "distill_loss_rows",
    "low_rank_linears",
    "low_rank_linears_backward",
)


@pytest.fixture
def both(make_checkpoint, text_file: Path, tmp_path: Path, device: torch.device):
    """both(**options) -> report and OUT of the same run on the reference and on Triton. Of one
    block: the interpreter is slow."""
    model = make_checkpoint("mamba", num_hidden_layers=1)

    def run(**options: Any) -> list[tuple[dict, Path]]:
        results = []
        for impl in ("reference", "triton"):
            given = {"reduction": 0.1, "text": text_file, "tokens": 400, "seq_len": 32,
                     "gauge": "plain", **options}  # fmt: skip
            with kernels_impl(impl, ops=OPS):
                report = lillama.compress(model, tmp_path / impl, device=str(device), **given)
            results.append((report, tmp_path / impl))
        return results

    return run


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of the Triton ops that ran, in order."""
    seen: list[str] = []

    def watch(name: str) -> None:
        original = getattr(torch.ops.lillama, name)

        @functools.wraps(original)
        def spy(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.ops.lillama, name, spy)

    for name in TRITON:
        watch(name)
    return seen


def test_compress_on_triton_equals_the_reference(both, calls, device):
    # on a GPU the engine trains under autocast to bf16
    near = 1e-4 if device.type == "cpu" else 2e-2
    (plain, reference), (fast, triton) = both()
    assert set(calls) == set(TRITON)
    assert plain["blocks"] and len(plain["blocks"]) == len(fast["blocks"])
    for one, other in zip(plain["blocks"], fast["blocks"], strict=True):
        for key in ("held_out_loss_before", "held_out_loss_after"):
            assert one[key] == pytest.approx(other[key], rel=near), key
    tensors = [
        {
            name: value
            for file in out.glob("*.safetensors")
            for name, value in load_file(file).items()
        }
        for out in (reference, triton)
    ]
    trained = [name for name in tensors[0] if name.endswith((".lr_A", ".lr_B"))]
    assert trained
    for name in trained:
        one, other = (found[name] for found in tensors)
        assert (one - other).norm() <= 10 * near * one.norm(), name


@torch.no_grad()
def test_a_compressed_model_on_triton_gives_the_references_logits(both, calls, device):
    (_, out), _ = both(train=False)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(device)
    calls.clear()
    for length in (3, 100):  # the decode kernels, and those for many rows
        ids = torch.arange(length, device=device)[None] % 300
        logits = []
        for impl in ("reference", "triton"):
            with kernels_impl(impl, ops=OPS):
                logits.append(model(ids).logits)
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert calls
