"""Mixtral on slots: keys and values allocated once, and a decode step of our own.

Prompts go through transformers' model with its own growing cache, as in generate(), and what they
leave is copied into a slot. A step is a plain sequence of operations over the first rows, each at a
position of its own, with a mask that hides what lies behind it. Letters: b rows of a step, T
tokens, H hidden_size, q heads of queries, h heads of keys, d head_dim, E experts, k of them a
token, n positions that a step looks at.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from lillama.errors import InputError
from lillama.modules.low_rank_experts import LowRankExperts
from lillama.serve.runner import PREFILL_CHUNK, Prefilled, lay_out, lookup, projection

__all__ = ["MixtralRunner"]

# Without a limit of the caller's; a slot of Mixtral-8x7B takes 0.5 GiB of so many in bf16
DEFAULT_MAX_LENGTH = 4096
# On a GPU a step looks at the next power of two of positions, at least so many: each is a graph
LEAST_WIDTH = 256
# Position embeddings that are a table: the others change with the length of the text
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Layer(NamedTuple):
    """A block's weights as a step reads them; qkv [(q + 2 h) d, H]."""

    input_norm: Tensor
    post_norm: Tensor
    eps: float
    qkv: Tensor
    out: Tensor
    router: Tensor
    experts: Experts


class _At(NamedTuple):
    """Where the rows of a step are: place [b, 1, 1, 1] int64, the position of each; mask
    [b, 1, 1, n]; cos and sin [b, 1, d], sin's first half negated."""

    place: Tensor
    mask: Tensor
    cos: Tensor
    sin: Tensor


class MixtralRunner:
    """A `Runner` (see lillama.serve.runner) for Mixtral, dense or with factorised experts.

    Args:
        model: MixtralForCausalLM in eval mode; its weights are laid out anew in place.
        slots: requests at once.
        max_length: tokens of prompt and output; None is what the model has positions for, at most
            4096.

    Raises:
        InputError: sliding windows or other position embeddings, or more tokens than positions.
    """

    def __init__(self, model: PreTrainedModel, slots: int, max_length: int | None) -> None:
        config: Any = model.config
        _check(config)
        positions = config.max_position_embeddings
        if max_length is not None and max_length > positions:
            raise InputError(
                f"max_length is {max_length}, the model has {positions} positions; lower it"
            )
        base: Any = model.get_submodule("model")
        head: Any = model.get_submodule("lm_head")
        self._model: Any = model
        self.device = model.device
        self.max_length = min(DEFAULT_MAX_LENGTH, positions) if max_length is None else max_length
        self.vocab_size = head.weight.shape[0]
        attention = base.layers[0].self_attn
        self._head_dim, self._scaling = attention.head_dim, attention.scaling
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._top_k = config.num_experts_per_tok
        self._embed = lookup(base.embed_tokens)
        self._head = projection(head, self.device)
        self._norm, self._eps = base.norm.weight, base.norm.variance_epsilon
        self._layers = [_layer(block, self.device) for block in base.layers]
        places = torch.arange(self.max_length, device=self.device)
        like = base.norm.weight
        self._cos, self._sin = _rotations(base.rotary_emb, like, places)
        self._places = places
        # one layer: keys, then values, [slots, 2 h, max_length, d]
        size = (slots, 2 * self._kv_heads, self.max_length, self._head_dim)
        self._kv = [torch.zeros(size, dtype=like.dtype, device=self.device) for _ in self._layers]
        self._lengths = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._known = [0] * slots  # the same on the host

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
        for kv, (keys, values) in zip(self._kv, state, strict=True):
            kv[slot, : self._kv_heads, :length] = keys[0]
            kv[slot, self._kv_heads :, :length] = values[0]
        self._lengths[slot] = self._known[slot] = length

    def move(self, source: int, target: int) -> None:
        length = self._known[source]
        for kv in self._kv:
            kv[target, :, :length] = kv[source, :, :length]
        self._lengths[target] = self._known[target] = length

    def clear(self, slot: int) -> None:
        # hidden places take part with weight 0, and 0 times NaN is NaN
        for kv in self._kv:
            kv[slot] = 0

    # Steps
    def shape_of(self, live: int) -> int:
        width = max(self._known[:live]) + 1
        if self.device.type == "cpu":
            return width  # nothing is captured: no wider than needed
        return min(self.max_length, max(LEAST_WIDTH, 1 << (width - 1).bit_length()))

    def advance(self, live: int) -> None:
        for slot in range(live):
            self._known[slot] += 1

    def step(self, ids: Tensor, shape: int) -> Tensor:
        # rows that are not live count on, and must stay inside
        position = self._lengths[: len(ids)].clamp(max=shape - 1)
        place = position[:, None, None, None]
        cos, sin = self._cos[position][:, None], self._sin[position][:, None]
        at = _At(place, self._places[:shape] <= place, cos, sin)
        x = self._embed(ids)
        for layer, kv in zip(self._layers, self._kv, strict=True):
            x = x + self._attention(layer, _normed(x, layer.input_norm, layer.eps), kv, at)
            x = x + self._moe(layer, _normed(x, layer.post_norm, layer.eps))
        self._lengths[: len(ids)] += 1
        return self._head(_normed(x, self._norm, self._eps))

    def _attention(self, layer: _Layer, x: Tensor, kv: Tensor, at: _At) -> Tensor:
        """x [b, H] -> [b, H]; kv of all slots gets the rows' keys and values."""
        b, h, size = len(x), self._kv_heads, self._head_dim
        heads = F.linear(x, layer.qkv).view(b, -1, size)
        turned = heads[:, : self._heads + h]
        turned = torch.addcmul(turned * at.cos, turned.roll(size // 2, -1), at.sin)
        new = torch.cat([turned[:, self._heads :], heads[:, self._heads + h :]], dim=1)[:, :, None]
        rows = kv[:b]
        rows.scatter_(2, at.place.expand(new.shape), new)
        seen = rows[:, :, : at.mask.shape[-1]]
        # the queries of one key head side by side, as if they were tokens
        queries = turned[:, : self._heads].reshape(b, h, -1, size)
        y = F.scaled_dot_product_attention(
            queries, seen[:, :h], seen[:, h:], attn_mask=at.mask, scale=self._scaling
        )
        return F.linear(y.reshape(b, -1), layer.out)

    def _moe(self, layer: _Layer, x: Tensor) -> Tensor:
        """x [b, H] -> [b, H]."""
        probs = F.linear(x, layer.router).float().softmax(dim=-1)
        weights, index = probs.topk(self._top_k, dim=-1)
        return layer.experts(x, index, weights / weights.sum(dim=-1, keepdim=True))


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _layer(block: Any, device: torch.device) -> _Layer:
    attention, experts = block.self_attn, block.mlp.experts
    return _Layer(
        input_norm=block.input_layernorm.weight,
        post_norm=block.post_attention_layernorm.weight,
        eps=block.input_layernorm.variance_epsilon,
        qkv=_joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=lay_out(attention.o_proj.weight),
        router=block.mlp.gate.weight,
        # on a GPU the modules: ours is one operation that reads nothing back
        experts=_experts_cpu(experts) if device.type == "cpu" else experts,
    )


def _joined(modules: list[nn.Linear]) -> Tensor:
    """The weights of layers with one input as one [sum of N_i, K]; theirs become views of it."""
    joined = lay_out(torch.cat([module.weight.data for module in modules]))
    parts = joined.split([module.out_features for module in modules])
    for module, part in zip(modules, parts, strict=True):
        module.weight.data = part
    return joined


def _rotations(rotary: nn.Module, like: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [max_length, d] in the dtype of `like`, sin's first half negated: with it,
    x cos + roll(x) sin turns x as transformers' rotate_half does."""
    with torch.no_grad():
        cos, sin = rotary(like, places[None])
    half = sin.shape[-1] // 2
    return cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)


def _experts_cpu(experts: Any) -> Experts:
    """What low_rank_experts computes, for the few rows of a step on a CPU, where cutting out every
    expert's weights at every call would take most of the time."""
    inner, downs = _gated_cpu(experts)

    def one(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        parts = [
            _products(inner(x, expert), downs[expert]) * weight
            for expert, weight in zip(index[0].tolist(), weights[0].to(x.dtype), strict=True)
        ]
        return sum(parts[1:], parts[0])

    def several(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        places: dict[int, list[tuple[int, int]]] = {}
        for row, chosen in enumerate(index.tolist()):
            for k, expert in enumerate(chosen):
                places.setdefault(expert, []).append((row, k))
        out = torch.zeros_like(x)
        weights = weights.to(x.dtype)
        # in the experts' order, so that a row's sum does not depend on the others
        for expert in sorted(places):
            rows, ks = torch.tensor(places[expert]).unbind(1)
            y = _products(inner(x[rows], expert), downs[expert])
            out.index_add_(0, rows, y * weights[rows, ks, None])
        return out

    return lambda x, index, weights: (one if len(x) == 1 else several)(x, index, weights)


def _gated_cpu(
    experts: Any,
) -> tuple[Callable[[Tensor, int], Tensor], list[tuple[Tensor, ...]]]:
    """silu(gate(x)) * up(x) of one expert, and the weights of every expert's down."""
    if isinstance(experts, LowRankExperts):
        for parameter in experts.parameters():
            lay_out(parameter)
        gates, ups, downs = (factors.by_expert() for factors in experts.factors())

        def low_rank(x: Tensor, expert: int) -> Tensor:
            return F.silu(_products(x, gates[expert])) * _products(x, ups[expert])

        return low_rank, downs
    both = experts.gate_up_proj.data.unbind(0)

    def dense(x: Tensor, expert: int) -> Tensor:
        gate, up = F.linear(x, both[expert]).chunk(2, dim=-1)
        return F.silu(gate) * up

    return dense, [(weight,) for weight in experts.down_proj.data]


def _products(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    for weight in weights:
        x = F.linear(x, weight)
    return x


def _check(config: Any) -> None:
    if config.sliding_window is not None:
        raise InputError(
            f"the model has a sliding_window of {config.sliding_window}; the engine serves "
            "attention to all tokens only: use vLLM"
        )
    kind = config.rope_parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise InputError(
            f"the model's rope_type is {kind!r}; the engine serves {', '.join(ROPE_TYPES)}: "
            "use vLLM"
        )
