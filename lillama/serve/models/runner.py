"""What the engine asks of a model: prompts into slots, and one token of every slot at a time.

Slots are rows of state allocated once. The engine keeps the live requests in the first ones, so
that a step over the first `batch` slots, of a few fixed sizes, is all there is. The functions below
turn a model's layers into plain functions, without a module's overhead: on a CPU, where a small
model's step is bound by the calls, PyTorch's products alone; on a GPU our ops, which choose their
kernels. The layers' weights are laid out for that in place: see `lay_out`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lillama_kernels import low_rank_linear, low_rank_linears, pivot_low_rank_linear
from torch import Tensor, nn

from lillama.modules.low_rank_embedding import LowRankEmbedding
from lillama.modules.low_rank_linear import LowRankLinear
from lillama.modules.pivot_low_rank_embedding import PivotLowRankEmbedding
from lillama.modules.pivot_low_rank_linear import PivotLowRankLinear

__all__ = ["PREFILL_CHUNK", "Function", "Prefilled", "Runner", "lay_out", "lookup"]
__all__ += ["projection", "projections"]

# Tokens of a prompt computed at once, between two decode steps of the other requests
PREFILL_CHUNK = 256

Function = Callable[[Tensor], Tensor]


class Prefilled(NamedTuple):
    """What came of a prompt: logits [1, V] of its next token, the state to put into a slot."""

    logits: Tensor
    state: Any


class Runner(ABC):
    """A model with its slots of at most max_length tokens; its logits are vocab_size wide."""

    vocab_size: int
    max_length: int
    device: torch.device

    def prefill(self, prompt: Tensor) -> Iterator[Prefilled | None]:
        """Compute a prompt [T] int64 in chunks, without touching any slot: None after each, and
        what came of it after the last."""
        done = None
        for ids in prompt.split(PREFILL_CHUNK):
            if done is not None:
                yield None
            done = self.chunk(ids, None if done is None else done.state)
        yield done

    @abstractmethod
    def chunk(self, ids: Tensor, state: Any) -> Prefilled:
        """Compute tokens [T] of a prompt after those in state, which is None for the first."""

    @abstractmethod
    def place(self, slot: int, state: Any) -> None:
        """Put what prefill made into a slot."""

    @abstractmethod
    def move(self, source: int, target: int) -> None:
        """Copy a slot over another."""

    @abstractmethod
    def step(self, ids: Tensor, shape: int) -> Tensor:
        """Compute one token ids [b] int64 of each of the first b slots -> logits [b, V]. Shapes
        depend on b and shape only, and nothing is read back."""

    def shape_of(self, live: int) -> int:
        """Return the shape of the next step over the first `live` slots, beyond its batch: a CUDA
        graph captured at another one must not be replayed."""
        return 0

    def advance(self, live: int) -> None:  # noqa: B027
        """Count on the host that a step over the first `live` slots was done, or replayed."""

    def clear(self, slot: int) -> None:  # noqa: B027
        """Keep numbers of a slot that are not finite from the next request in it; nothing where
        place() replaces all of it."""


def lay_out(weight: Tensor) -> Tensor:
    """Return the same weight [..., N, K]; on a CPU, where N > K, with columns side by side.

    A product with one row then adds columns to a result that stays in the cache, instead of
    starting a short sum for each of N outputs: 1.3x to 2.8x faster on 2 AMD EPYC cores. Changed in
    place, so that no second copy stays.
    """
    if weight.device.type == "cpu" and weight.shape[-2] > weight.shape[-1]:
        weight.data = weight.data.mT.contiguous().mT
    return weight


def lookup(module: nn.Module) -> Function:
    """Return token embeddings, dense or factorised, as a function of ids; TypeError for another
    kind of layer."""
    if isinstance(module, LowRankEmbedding):
        A, B = module.lr_A, module.lr_B
        return lambda ids: F.embedding(ids, B) @ A
    if isinstance(module, PivotLowRankEmbedding):
        B, C, order = module.lr_B, lay_out(module.lr_C), module.lr_order
        return lambda ids: _pivot_outputs(F.embedding(ids, B), C, order)
    if type(module) is nn.Embedding:
        weight = module.weight  # the parameter: a tied head lays it out anew
        return lambda ids: F.embedding(ids, weight)
    raise TypeError(f"cannot look tokens up in {type(module).__name__}")


def projection(module: nn.Module, device: torch.device) -> Function:
    """Return a linear layer, dense or factorised, as a function; TypeError for another kind."""
    bias: Any = getattr(module, "bias", None)
    on_cpu = device.type == "cpu"
    if isinstance(module, LowRankLinear):
        A, B = lay_out(module.lr_A), lay_out(module.lr_B)
        if on_cpu:
            return lambda x: F.linear(F.linear(x, A), B, bias)
        return lambda x: low_rank_linear(x, A, B, bias)
    if isinstance(module, PivotLowRankLinear):
        A, C, order = lay_out(module.lr_A), lay_out(module.lr_C), module.lr_order
        if on_cpu:
            return _plus(lambda x: _pivot_outputs(F.linear(x, A), C, order), bias)
        return lambda x: pivot_low_rank_linear(x, A, C, order, bias)
    if type(module) is nn.Linear:
        weight = lay_out(module.weight)
        return lambda x: F.linear(x, weight, bias)
    raise TypeError(f"a projection must be a linear layer, got {type(module).__name__}")


def projections(modules: Sequence[nn.Module], device: torch.device) -> Function:
    """Return linear layers with one input [..., K] as one function, their outputs side by side
    [..., sum of N_i].

    One product where all are dense, one for the first factors where all have plain factors; else
    one after the other, as `projection`. The modules' weights become parts of the joined ones.
    """
    if all(type(module) is nn.Linear for module in modules):
        weight, bias = _joined(modules, "weight"), _biases(modules)
        return lambda x: F.linear(x, weight, bias)
    if all(isinstance(module, LowRankLinear) for module in modules):
        return _low_ranks(modules, device)
    parts = [projection(module, device) for module in modules]
    return lambda x: torch.cat([part(x) for part in parts], dim=-1)


def _low_ranks(modules: Sequence[Any], device: torch.device) -> Function:
    first = _joined(modules, "lr_A")
    ranks = [module.rank for module in modules]
    Bs = [lay_out(module.lr_B) for module in modules]
    if device.type != "cpu":
        As, biases = first.split(ranks), [module.bias for module in modules]
        return lambda x: torch.cat(low_rank_linears(x, As, Bs, biases), dim=-1)

    def product(x: Tensor) -> Tensor:
        parts = F.linear(x, first).split(ranks, dim=-1)
        return torch.cat([F.linear(z, B) for z, B in zip(parts, Bs, strict=True)], dim=-1)

    return _plus(product, _biases(modules))


def _joined(modules: Sequence[nn.Module], name: str) -> Tensor:
    """Return weights of one K as one [sum of N_i, K]; the modules' own become views of it."""
    weights = [module.get_parameter(name) for module in modules]
    joined = lay_out(torch.cat([weight.data for weight in weights]))
    for weight, part in zip(weights, joined.split([len(w) for w in weights]), strict=True):
        weight.data = part
    return joined


def _biases(modules: Sequence[Any]) -> Tensor | None:
    """Return the biases behind each other, 0 for a layer that has none; None where none has one."""
    given = [module.bias for module in modules if module.bias is not None]
    if not given:
        return None
    zeros = given[0].new_zeros
    return torch.cat([zeros(m.out_features) if m.bias is None else m.bias.data for m in modules])


def _plus(product: Function, bias: Tensor | None) -> Function:
    return product if bias is None else lambda x: product(x) + bias


def _pivot_outputs(z: Tensor, C: Tensor, order: Tensor) -> Tensor:
    """The R outputs z [..., R] that are as they are, and the rest, in their order [..., N]."""
    return torch.cat([z, F.linear(z, C)], dim=-1).index_select(-1, order)
