"""What the engine asks of a model: prompts into slots, and one token of every slot at a time.

Slots are rows of state allocated once. The engine keeps the live requests in the first ones, so
that a step over the first `batch` slots, of a few fixed sizes, is all there is.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from lillama_kernels import low_rank_linear, low_rank_linears, pivot_low_rank_linear
from torch import Tensor, nn

from lillama.modules.low_rank_embedding import LowRankEmbedding
from lillama.modules.low_rank_linear import LowRankLinear
from lillama.modules.pivot_low_rank_embedding import PivotLowRankEmbedding
from lillama.modules.pivot_low_rank_linear import PivotLowRankLinear

__all__ = [
    "PREFILL_CHUNK",
    "Prefilled",
    "Runner",
    "lay_out",
    "lookup",
    "projection",
    "projections",
]

# Tokens of a prompt computed at once, between two decode steps of the other requests
PREFILL_CHUNK = 256


class Prefilled(NamedTuple):
    """logits [1, V] of the token after the prompt, and the state to put into a slot."""

    logits: Tensor
    state: Any


class Runner(Protocol):
    """A model with its slots.

    Attributes:
        vocab_size: V, the width of the logits.
        max_length: tokens of a slot at most.
        device: where it computes.
    """

    vocab_size: int
    max_length: int
    device: torch.device

    def prefill(self, prompt: Tensor) -> Iterator[Prefilled | None]:
        """Compute a prompt [T] int64 in chunks, without touching any slot: None after each, and
        what came of it after the last."""
        ...

    def place(self, slot: int, state: Any) -> None:
        """Put what prefill made into a slot."""
        ...

    def move(self, source: int, target: int) -> None:
        """Copy a slot over another."""
        ...

    def clear(self, slot: int) -> None:
        """Numbers that are not finite were found in a slot: nothing of them may reach the next
        request in it."""
        ...

    def shape_of(self, live: int) -> int:
        """The shape of the next step over the first `live` slots, beyond its batch: a CUDA graph
        captured at another one must not be replayed."""
        ...

    def step(self, ids: Tensor, shape: int) -> Tensor:
        """One token ids [b] int64 of each of the first b slots -> logits [b, V]. Shapes depend on
        b and shape only, and nothing is read back."""
        ...

    def advance(self, live: int) -> None:
        """A step over the first `live` slots was done, or replayed: count on the host."""
        ...


def lay_out(weight: Tensor) -> Tensor:
    """The same weight [..., N, K]; on a CPU, where N > K, with columns side by side in memory.

    A product with one row then adds columns to a result that stays in the cache, instead of
    starting a short sum for each of N outputs: 1.3x to 2.8x faster on 2 AMD EPYC cores, weights not
    in the cache. Changed in place, so that no second copy stays.
    """
    if weight.device.type == "cpu" and weight.shape[-2] > weight.shape[-1]:
        weight.data = weight.data.mT.contiguous().mT
    return weight


def lookup(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Token embeddings, dense or factorised, as a function of ids without a module's overhead.

    Raises:
        TypeError: another kind of layer.
    """
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


def projection(module: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A linear layer, dense or factorised, as a function without a module's overhead.

    On the CPU, where a small model's step is bound by the calls, it is PyTorch's products alone; on
    a GPU our op chooses its kernel. The module's weights are laid out for that: see `lay_out`.

    Raises:
        TypeError: another kind of layer.
    """
    if isinstance(module, LowRankLinear):
        return _low_rank(module, device)
    if isinstance(module, PivotLowRankLinear):
        return _pivot(module, device)
    if type(module) is nn.Linear:
        weight, bias = lay_out(module.weight), module.bias
        return lambda x: F.linear(x, weight, bias)
    raise TypeError(f"a projection must be a linear layer, got {type(module).__name__}")


def projections(modules: Sequence[nn.Module], device: torch.device) -> Callable[[Tensor], Tensor]:
    """Linear layers with one input [..., K] as one function, their outputs side by side
    [..., sum of N_i].

    One product where all are dense, one for the first factors where all have plain factors; else
    one after the other, as `projection`. The modules' weights become parts of the joined ones.

    Raises:
        TypeError: another kind of layer.
    """
    if all(type(module) is nn.Linear for module in modules):
        weight = _joined(modules, "weight")
        bias = _biases(modules)
        return lambda x: F.linear(x, weight, bias)
    if all(isinstance(module, LowRankLinear) for module in modules):
        return _low_ranks(modules, device)
    parts = [projection(module, device) for module in modules]
    return lambda x: torch.cat([part(x) for part in parts], dim=-1)


def _joined(modules: Sequence[nn.Module], name: str) -> Tensor:
    """Weights of one K as one [sum of N_i, K]; the modules' own become views of it."""
    weights = [module.get_parameter(name) for module in modules]
    joined = lay_out(torch.cat([weight.data for weight in weights]))
    for weight, part in zip(weights, joined.split([len(w) for w in weights]), strict=True):
        weight.data = part
    return joined


def _biases(modules: Sequence[Any]) -> Tensor | None:
    """The biases behind each other, 0 for a layer that has none; None where none has one."""
    if all(module.bias is None for module in modules):
        return None
    like = next(module.bias for module in modules if module.bias is not None)
    return torch.cat(
        [
            like.new_zeros(module.out_features) if module.bias is None else module.bias.data
            for module in modules
        ]
    )


def _low_ranks(modules: Sequence[Any], device: torch.device) -> Callable[[Tensor], Tensor]:
    first, bias = _joined(modules, "lr_A"), _biases(modules)
    ranks = [module.rank for module in modules]
    Bs = [lay_out(module.lr_B) for module in modules]
    if device.type != "cpu":
        As, biases = first.split(ranks), [module.bias for module in modules]
        return lambda x: torch.cat(low_rank_linears(x, As, Bs, biases), dim=-1)

    def project(x: Tensor) -> Tensor:
        parts = F.linear(x, first).split(ranks, dim=-1)
        y = torch.cat([F.linear(z, B) for z, B in zip(parts, Bs, strict=True)], dim=-1)
        return y if bias is None else y + bias

    return project


def _low_rank(module: LowRankLinear, device: torch.device) -> Callable[[Tensor], Tensor]:
    A, B, bias = lay_out(module.lr_A), lay_out(module.lr_B), module.bias
    if device.type == "cpu":
        return lambda x: F.linear(F.linear(x, A), B, bias)
    return lambda x: low_rank_linear(x, A, B, bias)


def _pivot(module: PivotLowRankLinear, device: torch.device) -> Callable[[Tensor], Tensor]:
    A, C, bias = lay_out(module.lr_A), lay_out(module.lr_C), module.bias
    order = module.lr_order
    if device.type != "cpu":
        return lambda x: pivot_low_rank_linear(x, A, C, order, bias)

    def project(x: Tensor) -> Tensor:
        y = _pivot_outputs(F.linear(x, A), C, order)
        return y if bias is None else y + bias

    return project


def _pivot_outputs(z: Tensor, C: Tensor, order: Tensor) -> Tensor:
    """The R outputs z [..., R] that are as they are, and the rest, in their order [..., N]."""
    return torch.cat([z, F.linear(z, C)], dim=-1).index_select(-1, order)
