"""What a model gives its blocks beside the hidden states: masks, positions, rotary embeddings."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lillama.errors import InputError

__all__ = ["blocks_as", "by_name", "check_arguments"]

# nothing is computed from these when a whole text runs through a block
CACHES = ("cache_params", "layer_past", "past_key_values")

Arguments = dict[str, Any]


def by_name(block: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> tuple[Tensor, Arguments]:
    """The hidden states and all other arguments of a call of `block` by their names, as a model may
    give them by place; without caches."""
    _, first, *names = inspect.signature(type(block).forward).parameters
    given = {**dict(zip((first, *names), args, strict=False)), **kwargs}
    states = given.pop(first)
    return states, {name: value for name, value in given.items() if name not in CACHES}


@contextmanager
def blocks_as(blocks: Iterable[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Run `forward` in place of every block's own."""
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _tensors(value: Any) -> list[Tensor]:
    """Those in an argument."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def check_arguments(model_type: str, calls: list[Arguments], others: list[Arguments]) -> None:
    """Raises InputError unless each block is told the same in `calls` and in `others`, which are
    made with other tokens: blocks run alone, and are then told nothing of the tokens."""
    for call, other in zip(calls, others, strict=True):
        for name in call:
            found, wanted = _tensors(call[name]), _tensors(other.get(name))
            same = len(found) == len(wanted) and all(map(torch.equal, found, wanted))
            if not same:
                raise InputError(
                    f"model_type {model_type!r} cannot be compressed block by block: the argument "
                    f"{name} of its blocks depends on the tokens"
                )
