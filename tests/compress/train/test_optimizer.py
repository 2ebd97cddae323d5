"""The optimizer of whole models: Muon for matrices, each expert for itself, AdamW for the rest."""

import copy

import pytest
import torch
from torch import nn

from lillama.compress.train.optimizer import WholeOptimizer
from lillama.integrations.loading import load_model
from lillama.modules.low_rank_experts import LowRankExperts

RATE, DECAY = 2e-3, 0.01


@pytest.fixture(scope="module")
def compressed(mixtral, text_file, tmp_path_factory):
    """Experts of several ranks, so that stacks are padded; factorised embeddings and head."""
    import lillama

    out = tmp_path_factory.mktemp("optimizer") / "out"
    lillama.compress(
        mixtral, out, preset="fast", gauge="plain", reduction=0.3, text=text_file, tokens=600,
        seq_len=32, device="cpu",
    )  # fmt: skip
    return out


def reference(value: torch.Tensor, gradients: list[torch.Tensor], muon: bool) -> torch.Tensor:
    """`value` after steps by PyTorch's own optimizer of this one tensor."""
    parameter = nn.Parameter(value.clone())
    optimizer = (
        torch.optim.Muon([parameter], lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
        if muon
        else torch.optim.AdamW([parameter], lr=RATE, weight_decay=DECAY)
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_every_matrix_takes_muons_steps_and_the_rest_adamws(compressed):
    model = load_model(compressed, torch.device("cpu"), "float32")
    before = copy.deepcopy(model)
    trained = dict(model.named_parameters())
    optimizer = WholeOptimizer(model, trained, DECAY)
    generator = torch.Generator().manual_seed(0)
    gradients = {n: [torch.randn(p.shape, generator=generator) for _ in range(3)]
                 for n, p in trained.items()}  # fmt: skip
    for step in range(3):
        for name, parameter in trained.items():
            parameter.grad = gradients[name][step].clone()
        optimizer.step(RATE)
        assert all(parameter.grad is None for parameter in trained.values())
    seen = {"experts": 0, "linear": 0, "rest": 0}
    for name, old in before.named_parameters():
        new, given = trained[name].detach(), gradients[name]
        if ".experts." in name:
            kind = "experts"
            expected = torch.stack(
                [reference(old[e].detach(), [g[e] for g in given], True) for e in range(len(old))]
            )
        elif "self_attn" in name:
            kind, expected = "linear", reference(old.detach(), given, True)
        else:
            kind, expected = "rest", reference(old.detach(), given, False)
        seen[kind] += 1
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-7, msg=name)
    assert min(seen.values()) > 0, seen
    rest = {n for n in trained if ".experts." not in n and "self_attn" not in n}
    assert any("embed_tokens" in n for n in rest) and any("norm" in n for n in rest)


def test_padding_of_experts_stays_zero(compressed):
    model = load_model(compressed, torch.device("cpu"), "float32")
    padded = [
        (module, name)
        for module in model.modules()
        if isinstance(module, LowRankExperts)
        for name, ranks in module.ranks.items()
        if min(ranks) < max(ranks)
    ]
    assert padded, "nothing is padded"
    optimizer = WholeOptimizer(model, dict(model.named_parameters()), DECAY)
    ids = torch.randint(model.config.vocab_size, (2, 16))
    for _ in range(3):
        model(ids).logits.square().mean().backward()
        optimizer.step(RATE)
    for module, name in padded:
        A, B = (getattr(module, f"{name}_{suffix}") for suffix in "AB")
        for expert, rank in enumerate(module.ranks[name]):
            assert not A[expert, rank:].any() and not B[expert, :, rank:].any()
            assert rank == 0 or A[expert, :rank].any()


def test_parameters_without_a_gradient_stay(compressed):
    model = load_model(compressed, torch.device("cpu"), "float32")
    trained = dict(model.named_parameters())
    before = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = WholeOptimizer(model, trained, DECAY)
    some = next(name for name in trained if "self_attn" in name)
    trained[some].grad = torch.ones_like(trained[some])
    optimizer.step(RATE)
    assert {n for n, value in before.items() if not torch.equal(value, trained[n])} == {some}
