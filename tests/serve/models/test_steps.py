"""The models behind the engine: both ways of a step agree, in every dtype, and what is refused."""

from typing import Any

import pytest
import torch
from lillama_kernels import kernels_impl, mamba_mixer_step
from lillama_kernels.dispatch import Impl

from lillama.errors import InputError
from lillama.integrations.loading import load_model
from lillama.serve.engine import LocalEngine
from lillama.serve.models import mamba as mamba_module
from lillama.serve.models.attention import AttentionRunner
from lillama.serve.models.experts import experts_cpu
from lillama.serve.models.mamba import MambaRunner

CPU = torch.device("cpu")
RANKS = {f"backbone.layers.0.mixer.{name}": 8 for name in ("in_proj", "out_proj")}
X_PROJ = RANKS | {"backbone.layers.0.mixer.x_proj": 8}
EXPERTS = {
    f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}": 8 * (1 + e % 2)
    for i in range(2)
    for e in range(3)
    for w in ("w1", "w2", "w3")
}
PROMPT = torch.tensor([5, 6, 7, 8, 9, 10])


@torch.inference_mode()
def steps(runner: Any, count: int = 4, impl: Impl = "auto") -> torch.Tensor:
    """Logits [count, 3, V] of three slots with prompts of their own, fed with fixed tokens."""
    for slot in range(3):
        *_, done = runner.prefill(PROMPT[slot:])
        runner.place(slot, done.state)
    found = []
    for step in range(count):
        width = runner.shape_of(3)
        with kernels_impl(impl):
            found.append(runner.step(torch.tensor([3, 11, 29]) + step, width).clone())
        runner.advance(3)
    return torch.stack(found).float()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("ranks", [{}, RANKS, X_PROJ], ids=["dense", "low-rank", "x_proj-too"])
def test_mamba_steps_agree_with_those_of_a_gpu(ranks, impl, make_low_rank, make_model, monkeypatch):
    """The GPU's step, by our operations: "triton" is the kernels in the interpreter."""

    def made() -> MambaRunner:
        sizes = {"num_hidden_layers": 1, "time_step_rank": 8}
        model = make_low_rank("mamba", ranks, **sizes) if ranks else make_model("mamba", **sizes)
        return MambaRunner(model, 3, None)

    count = 1 if impl == "triton" else 4
    wanted = steps(made(), count)
    monkeypatch.setattr(mamba_module._Mixer, "step_cpu", mamba_module._Mixer.step)
    fused: list[Any] = []

    def recorded(*arguments: Any) -> torch.Tensor:
        fused.append(arguments)
        return mamba_mixer_step(*arguments)

    monkeypatch.setattr(mamba_module, "mamba_mixer_step", recorded)
    found = steps(made(), count, impl)
    assert bool(fused) == (impl == "triton" and bool(ranks))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mamba", "mixtral"])
def test_steps_in_bf16_are_near_those_in_fp32(kind, make_model):
    runner = {"mamba": MambaRunner, "mixtral": AttentionRunner}[kind]
    exact = steps(runner(make_model(kind), 4, 64))
    rounded = steps(runner(make_model(kind, torch.bfloat16), 4, 64))
    assert rounded.isfinite().all()
    # a rounded router may choose another expert: most rows, not all
    near = (rounded - exact).abs().amax(-1) < 0.1 * exact.abs().amax(-1)
    assert float(near.float().mean()) > 0.7


@pytest.mark.parametrize("ranks", [{}, EXPERTS], ids=["dense", "low-rank"])
@pytest.mark.parametrize("rows", [1, 5])
def test_mixtral_experts_on_the_cpu_are_the_modules(rows, ranks, make_low_rank, make_model):
    model = make_low_rank("mixtral", ranks) if ranks else make_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 32, generator=generator)
    weights = torch.rand(rows, 2, generator=generator)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(rows)])
    with torch.no_grad():
        wanted = experts(x, index, weights)
        found = experts_cpu(experts)(x, index, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_mixtral_steps_do_not_depend_on_how_far_they_look(make_model):
    """A CUDA graph's step looks at more positions than are filled."""
    narrow, wide = (AttentionRunner(make_model("mixtral"), 4, 64) for _ in range(2))
    wide.shape_of = lambda live: 64
    torch.testing.assert_close(steps(wide), steps(narrow), rtol=1e-5, atol=1e-5)


def test_mixtral_slot_that_is_not_live_stays_inside(make_model):
    """Its position counts on past the last one."""
    runner = AttentionRunner(make_model("mixtral"), 2, 8)
    with torch.inference_mode():
        *_, done = runner.prefill(PROMPT)
        assert done is not None
        runner.place(0, done.state)
        for _ in range(40):
            assert runner.step(torch.tensor([3, 4]), 8).isfinite().all()


# Refusals
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mixtral", {"sliding_window": 16}, "sliding_window of 16"),
        (
            "mixtral",
            {
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                "head_dim": 8,
            },
            "rope_type is 'dynamic'",
        ),
        ("mamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_engine_refuses_models_it_would_get_wrong(kind, changes, message, make_checkpoint):
    with pytest.raises(InputError, match=message):
        LocalEngine(make_checkpoint(kind, **changes), device="cpu")


def test_engine_refuses_more_tokens_than_positions(mixtral):
    with pytest.raises(InputError, match="max_length is 513, the model has 512 positions"):
        LocalEngine(mixtral, device="cpu", max_length=513)
    assert LocalEngine(mixtral, device="cpu").max_length == 512


def test_engine_takes_the_model_over_and_its_weights_stay(mamba):
    """Weights are laid out anew for the CPU: same numbers."""
    model, laid = load_model(mamba, CPU), load_model(mamba, CPU)
    MambaRunner(laid, 1, None)
    for (name, wanted), found in zip(model.named_parameters(), laid.parameters(), strict=True):
        assert torch.equal(wanted, found), name
    assert not laid.get_parameter("lm_head.weight").is_contiguous()
