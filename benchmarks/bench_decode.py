"""One decode step of the serving engine, embedding to next token, low-rank and dense, beside one
step of transformers' model with its own cache (to which generate() adds its loop). Random weights;
tokens/s are batch / time of a step."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.decode_models import STEPS, model_of, prompt_of, work_of
from benchmarks.decode_shapes import DECODES, DecodeShape
from benchmarks.rows import Variant, Work, compare
from lillama.integrations.mamba import fast_mamba
from lillama.serve.models import AttentionRunner, MambaRunner, Runner

TOLERANCE = 1e-3  # of the largest logit, fp32


@torch.inference_mode()
def _ours(model: PreTrainedModel, shape: DecodeShape) -> Callable[[], Tensor]:
    """A step of the engine for a batch whose rows had the same prompt -> logits [b, V]."""
    device = model.device
    runner: Runner
    if shape.family == "mamba":
        runner = MambaRunner(model, shape.batch, None)
    else:
        runner = AttentionRunner(model, shape.batch, shape.prompt + STEPS)
    *_, done = runner.prefill(prompt_of(shape, 1, device)[0])
    assert done is not None
    for slot in range(shape.batch):
        runner.place(slot, done.state)
    ids = done.logits.argmax(-1).repeat(shape.batch)
    width = runner.shape_of(shape.batch)

    @torch.inference_mode()
    def call() -> Tensor:
        logits = runner.step(ids, width)
        ids.copy_(logits.argmax(-1))
        return logits

    return call


@torch.inference_mode()
def _theirs(model: PreTrainedModel, shape: DecodeShape) -> Callable[[], Tensor]:
    """The same by transformers' forward."""
    given: Any = model
    cache = DynamicCache(config=model.config)
    named = {"cache_params" if shape.family == "mamba" else "past_key_values": cache}
    prompt = prompt_of(shape, 1, model.device).expand(shape.batch, -1)
    logits = given(prompt, **named, use_cache=True, logits_to_keep=1).logits[:, -1]
    ids = logits.argmax(-1)

    @torch.inference_mode()
    def call() -> Tensor:
        logits = given(ids[:, None], **named, use_cache=True).logits[:, -1]
        if shape.family != "mamba":
            cache.crop(-1)  # as many positions at every step
        ids.copy_(logits.argmax(-1))
        return logits

    return call


def _check(shape: DecodeShape, model: PreTrainedModel) -> None:
    """Ours against transformers' in fp32, where no expert is chosen by rounding."""
    single = copy.deepcopy(model).float()
    theirs = _theirs(single, shape)()
    found = _ours(single, shape)()
    error = (found - theirs).abs().amax() / theirs.abs().amax()
    assert float(error) < TOLERANCE, f"logits differ by {float(error):.1e} of the largest"


@pytest.mark.parametrize("shape", DECODES, ids=lambda s: s.name)
def bench_decode(benchmark, shape, dtype, device):
    # around all of it: entering at every call would be timed too
    with fast_mamba():
        _compare(benchmark, shape, dtype, device)


def _compare(benchmark, shape, dtype, device):
    variants = {}
    for name, keep in (*shape.keeps, ("dense", 1.0)):
        model = model_of(shape, keep, dtype, device)
        ours = name if name == "ours" else f"ours_{name}"
        work = work_of(shape, model, shape.prompt)
        # transformers' first: ours lays out the weights anew
        variants[f"transformers_{name.replace('ours', 'low_rank')}"] = Variant(
            calls=[_theirs(copy.deepcopy(model), shape)], work=work, graph=False
        )
        variants[ours] = Variant(
            calls=[_ours(copy.deepcopy(model), shape)],
            check=lambda model=model: _check(shape, model),
            work=work,
        )
    row = compare(
        benchmark,
        variants,
        shape=shape,
        dtype=dtype,
        device=device,
        work=variants["ours"].work or Work(),
        rounds=10,
        warmup_rounds=1,
    )
    benchmark.extra_info["tokens_per_s"] = {
        mode: {name: round(1e6 * shape.batch / v["median_us"], 1) for name, v in found.items()}
        for mode, found in row["modes"].items()
    }
