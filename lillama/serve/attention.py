"""Attention models on slots: keys and values allocated once, positions of their own a row.

Prompts go through transformers' model with its own growing cache, exactly as in generate(), and the
keys and values they leave are copied into a slot. A decode step goes through the model's modules
too, with a cache that writes each row's token at that row's position and a mask that hides what
lies behind it. Letters: L layers, b rows of a step, T tokens, h key/value heads, d head_dim.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from lillama.errors import InputError
from lillama.serve.runner import PREFILL_CHUNK, Prefilled

__all__ = ["AttentionRunner"]

# Without a limit of the caller's; a Mixtral-8x7B slot of so many takes 0.5 GiB in bf16
DEFAULT_MAX_LENGTH = 4096
# On a GPU a step reads keys up to the next power of two, at least so many: each is a CUDA graph
LEAST_WIDTH = 256


class _SlotCache(Cache):
    """One step's view of the slots, in transformers' terms."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], lengths: Tensor) -> None:
        super().__init__(layers=[])
        self._keys, self._values, self._lengths = keys, values, lengths
        self._batch, self._width, self._position = 0, 0, lengths

    def begin(self, batch: int, width: int) -> tuple[Tensor, Tensor]:
        """A step of b rows over `width` positions. Returns position ids [b, 1] and a mask
        [b, 1, 1, width], True where a row may look."""
        self._batch, self._width = batch, width
        # rows that are not live count on, and must stay inside
        at = self._lengths[:batch].clamp(max=width - 1)
        self._position = at[:, None, None, None]
        places = torch.arange(width, device=at.device)
        return at[:, None], places <= self._position

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """key_states, value_states [b, h, 1, d] -> all keys and values [b, h, width, d]."""
        found = []
        for slots, new in ((self._keys, key_states), (self._values, value_states)):
            rows = slots[layer_idx][: self._batch]
            rows.scatter_(2, self._position.expand(new.shape), new)
            found.append(rows[:, :, : self._width])
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._width - 1


class AttentionRunner:
    """A `Runner` (see lillama.serve.runner) for a model whose every layer looks at all tokens.

    Args:
        model: a causal language model in eval mode.
        slots: requests at once.
        max_length: tokens of prompt and output; None is what the model has positions for, at most
            4096.

    Raises:
        InputError: a model with other layers, or more tokens than it has positions for.
    """

    def __init__(self, model: PreTrainedModel, slots: int, max_length: int | None) -> None:
        config: Any = model.config
        _check(config)
        positions = config.max_position_embeddings
        if max_length is not None and max_length > positions:
            raise InputError(
                f"max_length is {max_length}, the model has {positions} positions; lower it"
            )
        self._model: Any = model
        self.device = model.device
        self.max_length = min(DEFAULT_MAX_LENGTH, positions) if max_length is None else max_length
        head: Any = model.get_output_embeddings()
        self.vocab_size = head.weight.shape[0]
        # what a prompt of one token leaves tells the shapes
        with torch.no_grad():
            *_, probe = self.prefill(torch.zeros(1, dtype=torch.int64, device=self.device))
        assert probe is not None
        self._keys, self._values = (
            [self._slots(slots, tensor) for tensor in tensors]
            for tensors in zip(*probe.state, strict=True)
        )
        self._lengths = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._known = [0] * slots  # the lengths on the host
        self._cache = _SlotCache(self._keys, self._values, self._lengths)

    def _slots(self, slots: int, like: Tensor) -> Tensor:
        """like [1, h, 1, d] -> zeros [slots, h, max_length, d]."""
        _, heads, _, size = like.shape
        return like.new_zeros(slots, heads, self.max_length, size)

    # Prompts
    def prefill(self, prompt: Tensor) -> Iterator[Prefilled | None]:
        cache = DynamicCache(config=self._model.config)
        logits = prompt.new_empty(0)
        for start in range(0, len(prompt), PREFILL_CHUNK):
            if start:
                yield None
            logits = self._model(
                input_ids=prompt[None, start : start + PREFILL_CHUNK],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        layers: list[Any] = list(cache.layers)
        yield Prefilled(logits[:, -1], [(layer.keys, layer.values) for layer in layers])

    def place(self, slot: int, state: Any) -> None:
        length = state[0][0].shape[2]
        for index, (keys, values) in enumerate(state):
            self._keys[index][slot, :, :length] = keys[0]
            self._values[index][slot, :, :length] = values[0]
        self._lengths[slot] = self._known[slot] = length

    def move(self, source: int, target: int) -> None:
        length = self._known[source]
        for slots in (*self._keys, *self._values):
            slots[target, :, :length] = slots[source, :, :length]
        self._lengths[target] = self._known[target] = length

    def clear(self, slot: int) -> None:
        # hidden places take part with weight 0, and 0 times NaN is NaN
        for slots in (*self._keys, *self._values):
            slots[slot] = 0

    # Steps
    def shape_of(self, live: int) -> int:
        width = max(self._known[:live]) + 1
        if self.device.type == "cpu":
            return width  # nothing is captured: no wider than needed
        return min(self.max_length, max(LEAST_WIDTH, 1 << (width - 1).bit_length()))

    def step(self, ids: Tensor, shape: int) -> Tensor:
        positions, mask = self._cache.begin(len(ids), shape)
        logits = self._model(
            input_ids=ids[:, None],
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        self._lengths[: len(ids)] += 1
        return logits[:, -1]

    def advance(self, live: int) -> None:
        for slot in range(live):
            self._known[slot] += 1


def _check(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds != {"full_attention"} or window is not None:
        found = f"sliding_window {window}" if window is not None else f"layers {sorted(kinds)}"
        raise InputError(
            f"the model has {found}; the engine serves attention to all tokens only: use vLLM"
        )
    if config._attn_implementation != "sdpa":
        raise InputError(
            f"the model's attn_implementation is {config._attn_implementation!r}; the engine "
            "needs 'sdpa'"
        )
