"""One Mamba block, low-rank on our kernels, beside the dense block on them and beside transformers'
own path for both (mamba_ssm's, where that is installed): a decode step, or a whole prompt."""

from collections.abc import Callable

import pytest
import torch
from lillama_kernels.testing import assert_close_to_truth
from torch import Tensor
from transformers import MambaConfig, MambaModel
from transformers.models.mamba import modeling_mamba

from benchmarks.rows import Variant, Work, compare
from benchmarks.shapes import MAMBA_BLOCKS, MambaBlockShape
from lillama.integrations.mamba import fast_mamba
from lillama.modules import LowRankLinear

PROMPT = 8  # tokens before a decode step


def _model(
    shape: MambaBlockShape, low_rank: bool, dtype: torch.dtype, device: torch.device
) -> MambaModel:
    """A block without embeddings to speak of, random weights."""
    config = MambaConfig(
        vocab_size=8,
        hidden_size=shape.hidden_size,
        state_size=shape.state_size,
        time_step_rank=shape.time_step_rank,
        num_hidden_layers=1,
        residual_in_fp32=False,
    )
    torch.manual_seed(0)
    with device:
        model = MambaModel(config).to(dtype).eval()
        mixer = model.layers[0].mixer
        if low_rank:
            for name, rank in zip(("in_proj", "out_proj"), shape.ranks, strict=True):
                old = getattr(mixer, name)
                new = LowRankLinear(old.in_features, old.out_features, rank, dtype=dtype)
                for factor in (new.A, new.B):
                    torch.nn.init.normal_(factor, std=factor.shape[-1] ** -0.5)
                setattr(mixer, name, new)
    return model


def _paths() -> dict[bool, dict[str, object]]:
    """What transformers' module calls, ours (True) and its own: entering fast_mamba at every call
    would be timed too."""
    theirs = dict(vars(modeling_mamba))
    with fast_mamba():
        ours = {n: f for n, f in vars(modeling_mamba).items() if f is not theirs[n]}
    return {True: ours, False: {name: theirs[name] for name in ours}}


PATHS = _paths()


def _call(model: MambaModel, x: Tensor, fast: bool) -> Callable[[], Tensor]:
    """The block over x [B, T, H], after a prompt where T is 1."""
    cache = None
    if x.shape[1] == 1:
        generator = torch.Generator(x.device).manual_seed(1)
        size = (x.shape[0], PROMPT, x.shape[2])
        prompt = torch.randn(size, generator=generator, device=x.device).to(x.dtype)
        with torch.no_grad():
            cache = model(inputs_embeds=prompt, use_cache=True).cache_params

    def call() -> Tensor:
        modeling_mamba.__dict__.update(PATHS[fast])
        with torch.no_grad():
            given = {} if cache is None else {"cache_params": cache}
            out = model(inputs_embeds=x, use_cache=cache is not None, **given)
            return out.last_hidden_state

    return call


def _check(shape: MambaBlockShape, dtype: torch.dtype, device: torch.device, x: Tensor) -> None:
    """Ours to the tolerance rule, with transformers' own path as baseline and as truth in fp64."""
    x = x[:, :64]  # transformers' scan takes seconds for more
    model = _model(shape, True, dtype, device)
    ours, theirs = _call(model, x, True)(), _call(model, x, False)()
    truth = _call(model.double(), x.double(), False)()
    assert_close_to_truth(ours, truth, theirs)


def _work(shape: MambaBlockShape, low_rank: bool, size: int) -> Work:
    """Weights once and the tokens in and out."""
    h, i, rows = shape.hidden_size, 2 * shape.hidden_size, shape.batch * shape.steps
    projections = 3 * h * i
    if low_rank:
        projections = shape.ranks[0] * (h + 2 * i) + shape.ranks[1] * (h + i)
    weights = projections + i * (2 * shape.time_step_rank + 2 * shape.state_size)
    # the state is read and written once a sequence
    moved = size * (weights + 2 * rows * h) + 8 * shape.batch * i * shape.state_size
    return Work(flop=2.0 * rows * weights, bytes_moved=moved)


@pytest.mark.parametrize("shape", MAMBA_BLOCKS, ids=lambda s: s.name)
def bench_mamba_block(benchmark, shape, dtype, device):
    generator = torch.Generator(device).manual_seed(2)
    size = (shape.batch, shape.steps, shape.hidden_size)
    x = torch.randn(size, generator=generator, device=device).to(dtype)
    variants = {}
    for name, low_rank, fast in (
        ("ours", True, True),
        ("dense_on_ours", False, True),
        ("transformers_low_rank", True, False),
        ("transformers_dense", False, False),
    ):
        model = _model(shape, low_rank, dtype, device)
        variants[name] = Variant(
            calls=[_call(model, x, fast)],
            check=(lambda: _check(shape, dtype, device, x)) if name == "ours" else None,
            work=_work(shape, low_rank, x.element_size()),
        )
    slow = shape.steps > 1024
    compare(
        benchmark,
        variants,
        shape=shape,
        dtype=dtype,
        device=device,
        work=_work(shape, True, x.element_size()),
        rounds=3 if slow else 10,
        warmup_rounds=1,
        sample_s=0.0 if slow else 1e-3,
    )
