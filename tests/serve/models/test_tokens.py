"""Every kind of model behind the engine, dense and factorised: generate()'s own greedy tokens,
alone and among others."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from lillama.errors import InputError
from lillama.serve.engine import LocalEngine
from lillama.serve.models import MODEL_TYPES
from tests.serve.heard import PROMPTS, Heard, generated, greedy, reference, uneven, wait_for

TOKENS = 18
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def ranks_of(*names: str, layer: int, inside: str = "self_attn") -> dict[str, int]:
    """No two of them alike, so that none can be taken for another."""
    return {f"model.layers.{layer}.{inside}.{name}": 8 + i for i, name in enumerate(names)}


def both(layer: int) -> dict[str, int]:
    return ranks_of(*ATTENTION, layer=layer) | ranks_of(*MLP, layer=layer, inside="mlp")


def experts(layer: int) -> dict[str, int]:
    """Every second one, and nothing of the others."""
    return {
        name: rank
        for e in (0, 2)
        for name, rank in ranks_of(*MLP, layer=layer, inside=f"mlp.experts.{e}").items()
    }


def mixers(*names: str) -> dict[str, int]:
    return {f"backbone.layers.{i}.mixer.{name}": 8 + 8 * i for i in (0, 1) for name in names}


def hub_experts() -> dict[str, int]:
    """Some, by the names that Mixtral's checkpoints have."""
    chosen = ((0, 0, "w1"), (0, 0, "w3"), (0, 2, "w2"), (1, 1, "w1"), (1, 1, "w2"))
    return {f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}": 8 for i, e, w in chosen}


OPEN, UNTIED = {"sliding_window": None}, {"tie_word_embeddings": False}
BIASED = {"attention_bias": True, "mlp_bias": True}
WORDS = {"model.embed_tokens": 12, "lm_head": 20}
MAMBA_WORDS = {"backbone.embeddings": 8, "lm_head": 12}
# name: model type, ranks, config changes
CASES: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "mamba": ("mamba", {}, {}),
    "mamba-low-rank": ("mamba", mixers("in_proj", "out_proj", "x_proj") | MAMBA_WORDS, UNTIED),
    "mamba-pivot": ("mamba", mixers("in_proj") | MAMBA_WORDS, UNTIED | {"gauge": "pivot"}),
    "mixtral": ("mixtral", {}, {}),
    "mixtral-low-rank": ("mixtral", hub_experts() | WORDS, UNTIED),
    "mixtral-pivot": ("mixtral", hub_experts(), {"gauge": "pivot"}),
    "llama": ("llama", {}, {}),
    "llama-tied-biases": ("llama", {}, BIASED | {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-low-rank": ("llama", both(0) | both(1) | WORDS, BIASED),
    "llama-pivot": ("llama", both(0) | both(1) | WORDS, BIASED | {"gauge": "pivot"}),
    "mistral": ("mistral", {}, OPEN),
    "mistral-some": (
        "mistral",
        ranks_of("q_proj", "v_proj", layer=0) | ranks_of("up_proj", layer=1, inside="mlp"),
        OPEN,
    ),
    "qwen2": ("qwen2", {}, {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen2-low-rank": ("qwen2", both(0) | both(1), {"use_sliding_window": False}),
    "qwen3": ("qwen3", {}, {"num_key_value_heads": 1}),
    "qwen3-low-rank": ("qwen3", both(0) | both(1) | WORDS, {}),
    "qwen3-moe": ("qwen3_moe", {}, {"norm_topk_prob": True}),
    "qwen3-moe-low-rank": (
        "qwen3_moe",
        both(0) | experts(1) | ranks_of(*ATTENTION, layer=1),
        {"norm_topk_prob": False},
    ),
    "olmoe": ("olmoe", {}, {"norm_topk_prob": False}),
    "olmoe-low-rank": ("olmoe", ranks_of(*ATTENTION, layer=0) | experts(1), {}),
}


class Case(NamedTuple):
    """wanted: the ids that generate() adds to each of PROMPTS."""

    engine: LocalEngine
    wanted: list[list[int]]


@pytest.fixture(scope="module", params=CASES)
def case(request, make_model, make_low_rank, tokenizer, tmp_path_factory, device) -> Iterator[Case]:
    kind, ranks, changes = CASES[request.param]
    path = tmp_path_factory.mktemp(request.param)
    model = make_low_rank(kind, ranks, **changes) if ranks else make_model(kind, **changes)
    uneven(model).save_pretrained(path)
    tokenizer.save_pretrained(path)
    engine = LocalEngine(path, device=str(device), max_batch=3, max_length=64)
    engine.start()
    model = reference(path, device)
    yield Case(engine, [generated(model, prompt, TOKENS) for prompt in PROMPTS])
    engine.stop()


def test_engine_alone_equals_generate(case):
    for prompt, wanted in zip(PROMPTS, case.wanted, strict=True):
        heard = Heard()
        case.engine.submit(prompt, greedy(TOKENS), heard)
        assert heard.finished().reason == "length"
        assert heard.ids == wanted
    assert len({tuple(wanted) for wanted in case.wanted}) == len(PROMPTS), "a model that looks"


def test_engine_among_others_equals_generate(case):
    """More requests than slots, of different lengths, some arriving while others run."""
    heard = []
    for index in range(12):
        heard.append(Heard())
        prompt, count = PROMPTS[index % len(PROMPTS)], 3 + 5 * (index % 4)
        case.engine.submit(prompt, greedy(count), heard[-1])
        if index % 3 == 2:
            wait_for(lambda: heard[-1].ids)
    for index, one in enumerate(heard):
        one.finished()
        assert one.ids == case.wanted[index % len(PROMPTS)][: 3 + 5 * (index % 4)], index


def test_engine_serves_up_to_the_sliding_window(make_checkpoint, device):
    """A request that fills it sees all of its tokens, in the prompt and in the steps."""
    path = make_checkpoint("mistral", sliding_window=48)
    with pytest.raises(InputError, match="sliding_window of 48 and requests may have 49 tokens"):
        LocalEngine(path, device=str(device), max_length=49)
    with pytest.raises(InputError, match="may have 512 tokens.*lower max_length to 48"):
        LocalEngine(path, device=str(device))
    engine = LocalEngine(path, device=str(device), max_length=48)
    engine.start()
    for length in (3, 47):
        prompt, heard = [(7 * i) % 250 + 1 for i in range(length)], Heard()
        engine.submit(prompt, greedy(48 - length), heard)
        heard.finished()
        assert heard.ids == generated(reference(path, device), prompt, 48 - length)
    engine.stop()


def test_every_model_type_is_tested():
    assert {kind for kind, _, _ in CASES.values()} == {"mamba", *MODEL_TYPES}
