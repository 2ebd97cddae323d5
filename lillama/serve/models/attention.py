"""Decoders with attention on slots: keys and values allocated once, and a step of our own.

Llama and its kin, dense or with experts: RMSNorm, rotary positions, attention to all tokens, a
gated MLP with silu. Prompts go through transformers' model with its own growing cache, as in
generate(), and what they leave is copied into a slot. A step is a plain sequence of operations over
the first rows, each at a position of its own, with a mask that hides what lies behind it. Letters:
b rows of a step, T tokens, H hidden_size, q heads of queries, h heads of keys, d head_dim, n
positions that a step looks at.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from lillama.errors import InputError
from lillama.serve.models.experts import expand_pivots, experts_cpu
from lillama.serve.models.runner import Function, Prefilled, Runner, lookup, projection, projections

__all__ = ["MODEL_TYPES", "AttentionRunner"]

# A step computes what transformers computes for these; a model type that is not here may differ in
# ways that no config tells (scaled embeddings, a shared expert, norms of another kind)
MODEL_TYPES = ("llama", "mistral", "mixtral", "olmoe", "qwen2", "qwen3", "qwen3_moe")
# Without a limit of the caller's; a slot of Mixtral-8x7B takes 0.5 GiB of so many in bf16
DEFAULT_MAX_LENGTH = 4096
# On a GPU a step looks at the next power of two of positions, at least so many: each is a graph
LEAST_WIDTH = 256
# Position embeddings that are a table: the others change with the length of the text
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# What a config may say that a step does not do, and the values that ask for nothing of it
PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    **dict.fromkeys(("clip_qkv", "attention_chunk_size"), (None,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (None,)),
}


class _At(NamedTuple):
    """Where the rows of a step are: place [b, 1, 1, 1] int64, the position of each; mask
    [b, 1, 1, n]; cos and sin [b, 1, d], sin's first half negated."""

    place: Tensor
    mask: Tensor
    cos: Tensor
    sin: Tensor


class AttentionRunner(Runner):
    """A `Runner` for the models of MODEL_TYPES, every projection dense or factorised in either
    gauge, tied or factorised embeddings and head. The model, in eval mode, is laid out anew in
    place; max_length None is what it has positions for, at most 4096. Raises as `check`.
    """

    def __init__(self, model: PreTrainedModel, slots: int, max_length: int | None) -> None:
        config: Any = model.config
        self.max_length = self.check(config, max_length)
        base: Any = model.get_submodule("model")
        head: Any = model.get_submodule("lm_head")
        self._model: Any = model
        self.device = model.device
        self.vocab_size = head.weight.shape[0]
        self._embed = lookup(base.embed_tokens)
        self._head = projection(head, self.device)
        self._norm, self._eps = base.norm.weight, base.norm.variance_epsilon
        self._places = torch.arange(self.max_length, device=self.device)
        with torch.no_grad():
            cos, sin = base.rotary_emb(self._norm, self._places[None])  # in the norm's dtype
        # sin's first half negated: x cos + roll(x) sin turns x as transformers' rotate_half does
        self._cos, half = cos[0], sin.shape[-1] // 2
        self._sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._blocks = [_Block(block, heads, kv_heads, self.device) for block in base.layers]
        # one block: keys, then values, [slots, 2 h, max_length, d]
        size = (slots, 2 * kv_heads, self.max_length, base.layers[0].self_attn.head_dim)
        self._kv = [self._norm.new_zeros(size) for _ in self._blocks]
        self._lengths = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._known = [0] * slots  # the same on the host

    @staticmethod
    def check(config: Any, max_length: int | None) -> int:
        """Return max_length, resolved, if the model of this config can be served exactly; raise
        InputError for another model type, a sliding window shorter than a request may be, other
        position embeddings or activations, or more tokens than positions."""
        for refusal in _refusals(config):
            raise InputError(f"{refusal}: use vLLM")
        positions = config.max_position_embeddings
        if max_length is not None and max_length > positions:
            raise InputError(
                f"max_length is {max_length}, the model has {positions} positions; lower it"
            )
        length = min(DEFAULT_MAX_LENGTH, positions) if max_length is None else max_length
        window = getattr(config, "sliding_window", None)
        # a config that does not tell layers apart means all of them
        kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
        if window is not None and window < length and "sliding_attention" in kinds:
            raise InputError(
                f"the model has a sliding_window of {window} and requests may have {length} "
                "tokens; the engine serves attention to all tokens only: lower max_length to "
                f"{window}, or use vLLM"
            )
        return length

    def chunk(self, ids: Tensor, state: Any) -> Prefilled:
        cache = DynamicCache(config=self._model.config) if state is None else state
        given = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        return Prefilled(self._model(input_ids=ids[None], **given).logits[:, -1], cache)

    def place(self, slot: int, state: Any) -> None:
        for kv, layer in zip(self._kv, state.layers, strict=True):
            length = layer.keys.shape[2]
            kv[slot, :, :length] = torch.cat([layer.keys[0], layer.values[0]])
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
        for block, kv in zip(self._blocks, self._kv, strict=True):
            x = x + block.attention(_normed(x, block.input_norm, block.eps), kv, at)
            x = x + block.mlp(_normed(x, block.post_norm, block.eps))
        self._lengths[: len(ids)] += 1
        return self._head(_normed(x, self._norm, self._eps))


class _Block:
    """A block as a step reads it: attention and mlp, each [b, H] -> [b, H] after a norm."""

    def __init__(self, block: Any, heads: int, kv_heads: int, device: torch.device) -> None:
        given = block.self_attn
        self._heads, self._kv_heads, self._size = heads, kv_heads, given.head_dim
        self._scaling = given.scaling
        self.input_norm = block.input_layernorm.weight
        self.post_norm = block.post_attention_layernorm.weight
        self.eps = block.input_layernorm.variance_epsilon
        self._qkv = projections([given.q_proj, given.k_proj, given.v_proj], device)
        self._head_norm = _head_norm(given, heads, kv_heads)
        self._out = projection(given.o_proj, device)
        self.mlp = (_moe if hasattr(block.mlp, "experts") else _gated)(block.mlp, device)

    def attention(self, x: Tensor, kv: Tensor, at: _At) -> Tensor:
        """x [b, H] -> [b, H]; kv of all slots gets the rows' keys and values."""
        b, q, h, size = len(x), self._heads, self._kv_heads, self._size
        heads = self._qkv(x).view(b, -1, size)  # [b, q + 2 h, d]
        turned = heads[:, : q + h]
        if self._head_norm is not None:
            turned = self._head_norm(turned)
        turned = torch.addcmul(turned * at.cos, turned.roll(size // 2, -1), at.sin)
        new = torch.cat([turned[:, q:], heads[:, q + h :]], dim=1)[:, :, None]
        rows = kv[:b]
        rows.scatter_(2, at.place.expand(new.shape), new)
        seen = rows[:, :, : at.mask.shape[-1]]
        # the queries of one key head side by side, as if they were tokens
        queries = turned[:, :q].reshape(b, h, -1, size)
        y = F.scaled_dot_product_attention(
            queries, seen[:, :h], seen[:, h:], attn_mask=at.mask, scale=self._scaling
        )
        return self._out(y.reshape(b, -1))


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _head_norm(attention: Any, heads: int, kv_heads: int) -> Function | None:
    """Return q_norm and k_norm on [b, q + h, d], where a model has them: over every head, as in
    Qwen3, or over all of a token's queries and all of its keys, as in OLMoE."""
    if not hasattr(attention, "q_norm"):
        return None
    q, k, size = attention.q_norm.weight, attention.k_norm.weight, attention.head_dim
    eps = attention.q_norm.variance_epsilon
    if len(q) == len(k) == size:
        both = torch.cat([q.data.expand(heads, size), k.data.expand(kv_heads, size)])
        return lambda x: F.rms_norm(x, (size,), None, eps) * both

    def whole(x: Tensor) -> Tensor:
        queries, keys = (part.flatten(1) for part in x.split([heads, kv_heads], dim=1))
        return torch.cat([_normed(queries, q, eps), _normed(keys, k, eps)], dim=1).view(x.shape)

    return whole


def _gated(mlp: Any, device: torch.device) -> Function:
    """Return down(silu(gate(x)) * up(x))."""
    both = projections([mlp.gate_proj, mlp.up_proj], device)
    down = projection(mlp.down_proj, device)

    def run(x: Tensor) -> Tensor:
        gate, up = both(x).chunk(2, dim=-1)
        return down(F.silu(gate) * up)

    return run


def _moe(mlp: Any, device: torch.device) -> Function:
    """Return the experts that the router's softmax ranks first, weighted with it."""
    router, top_k = mlp.gate.weight, mlp.gate.top_k
    # Mixtral always scales the weights to a sum of 1, and leaves them in fp32
    scaled, rounded = getattr(mlp.gate, "norm_topk_prob", True), hasattr(mlp.gate, "norm_topk_prob")
    # on a GPU the module: ours is one operation that reads nothing back
    held: Any = expand_pivots(mlp)
    experts = experts_cpu(held) if device.type == "cpu" else held

    def run(x: Tensor) -> Tensor:
        probs = F.linear(x, router).float().softmax(dim=-1)
        weights, index = probs.topk(top_k, dim=-1)
        if scaled:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return experts(x, index, weights.to(x.dtype) if rounded else weights)

    return run


def _refusals(config: Any) -> Iterator[str]:
    """Yield what a step does not compute, whatever the length."""
    if config.model_type not in MODEL_TYPES:
        served = ", ".join(("mamba", *MODEL_TYPES))
        yield f"the engine does not serve model type {config.model_type!r}; it serves {served}"
    rope, ours = config.rope_parameters, "; the engine serves "
    if rope["rope_type"] not in ROPE_TYPES:
        yield f"the model's rope_type is {rope['rope_type']!r}{ours}{', '.join(ROPE_TYPES)}"
    if rope.get("partial_rotary_factor") not in (None, 1):
        share = rope["partial_rotary_factor"]
        yield f"the model's partial_rotary_factor is {share}; the engine turns whole heads"
    for key, plain in PLAIN.items():
        value = getattr(config, key, plain[0])
        if value not in plain:
            only = f"{config.model_type} with {' or '.join(map(repr, plain))} only"
            yield f"the model's {key} is {value!r}{ours}{only}"
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := kinds - {"full_attention", "sliding_attention"}:
        names = ", ".join(sorted(other))
        yield f"the model has layers of {names}{ours}attention to all tokens only"
