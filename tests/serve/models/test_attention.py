"""Models with attention behind the engine, dense and factorised: generate()'s own greedy tokens,
alone and among others, its parts beside transformers' modules, and what is refused. Mixtral's
tokens are in test_engine.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lillama.errors import InputError
from lillama.families import FAMILIES
from lillama.modules import LowRankLinear
from lillama.serve.engine import LocalEngine
from lillama.serve.models.attention import MODEL_TYPES, AttentionRunner, _gated, _moe
from lillama.serve.models.runner import projections
from tests.conftest import config_of
from tests.serve.heard import PROMPTS, Heard, greedy, wait_for

TOKENS = 18
CPU, GPU = torch.device("cpu"), torch.device("cuda")
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


OPEN = {"sliding_window": None}
BIASED = {"attention_bias": True, "mlp_bias": True}
WORDS = {"model.embed_tokens": 12, "lm_head": 20}
# name: model type, ranks, config changes
CASES: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
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


@torch.no_grad()
def uneven(model: Any) -> Any:
    """The model with norms that are not all 1."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def loaded(path: Path, device: torch.device) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
    model.generation_config.eos_token_id = None  # go on after it
    return model


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        use_cache=True,
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=CASES)
def case(request, make_model, make_low_rank, tokenizer, tmp_path_factory, device) -> Iterator[Case]:
    kind, ranks, changes = CASES[request.param]
    path = tmp_path_factory.mktemp(request.param)
    model = make_low_rank(kind, ranks, **changes) if ranks else make_model(kind, **changes)
    uneven(model).save_pretrained(path)
    tokenizer.save_pretrained(path)
    engine = LocalEngine(path, device=str(device), max_batch=3, max_length=64)
    engine.start()
    reference = loaded(path, device)
    yield Case(engine, [generated(reference, prompt, TOKENS) for prompt in PROMPTS])
    engine.stop()


# Tokens
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
        assert heard.ids == generated(loaded(path, device), prompt, 48 - length)
    engine.stop()


def test_every_model_type_is_tested():
    assert {kind for kind, _, _ in CASES.values()} | {"mixtral"} == set(MODEL_TYPES)


def test_docs_list_every_family():
    lines = (Path(__file__).parents[3] / "docs" / "serving.md").read_text("utf-8").splitlines()
    start = lines.index("| served | not served |")
    rows = [line.split("|")[1:3] for line in lines[start + 2 : start + 4]]
    served, other = ({name for row in rows for name in row[i].split()} for i in range(2))
    assert served == {f"`{name}`" for name in (*MODEL_TYPES, "mamba")}
    assert other == {f"`{name}`" for name in REFUSED}


# Parts
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("ranks", [(0, 0, 0), (3, 5, 4), (0, 5, 4)], ids=str)
@pytest.mark.parametrize("biases", ["all", "some", "none"])
@torch.no_grad()
def test_projections_are_the_layers(biases, ranks, device):
    """In both ways; that of a GPU with tensors on the CPU."""
    torch.manual_seed(0)
    modules = []
    for i, rank in enumerate(ranks):
        bias = biases == "all" or (biases == "some" and i == 1)
        sizes = 12, 6 + 8 * i
        modules.append(LowRankLinear(*sizes, rank, bias) if rank else nn.Linear(*sizes, bias))
        for parameter in modules[-1].parameters():
            parameter.normal_()
    for x in (torch.randn(1, 12), torch.randn(5, 12)):
        wanted = torch.cat([module(x) for module in modules], dim=-1)
        for _ in range(2):  # and the layers stay what they are
            torch.testing.assert_close(projections(modules, device)(x), wanted)
            found = torch.cat([module(x) for module in modules], dim=-1)
            torch.testing.assert_close(found, wanted)


def test_projections_share_the_layers_memory():
    modules = [nn.Linear(12, 6, bias=False), nn.Linear(12, 20, bias=False)]
    projections(modules, CPU)
    first, second = (module.weight.untyped_storage().data_ptr() for module in modules)
    assert first == second


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"mlp_bias": True}),
        ("mixtral", {}),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": []}),
        ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": []}),
        ("olmoe", {"norm_topk_prob": False}),
    ],
)
@torch.no_grad()
def test_mlp_is_transformers(kind, changes, device, make_model):
    mlp = make_model(kind, **changes).model.layers[0].mlp
    torch.manual_seed(0)
    for x in (torch.randn(1, 32), torch.randn(6, 32)):
        wanted = mlp(x[None])[0]
        found = (_moe if hasattr(mlp, "experts") else _gated)(mlp, device)(x)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe", "olmoe"])
@torch.inference_mode()
def test_steps_in_bf16_are_as_near_as_transformers(kind, make_model):
    """To the same weights in fp32; norms and routers round where transformers rounds."""
    changes = {"sliding_window": None} if kind == "qwen2" else {}
    prompt = torch.tensor([5, 6, 7, 8, 9, 10])
    rounded = uneven(make_model(kind, torch.bfloat16, **changes))
    theirs = rounded(prompt[None]).logits[0, -1].float()
    exact = make_model(kind, **changes)
    for new, old in zip(exact.parameters(), rounded.parameters(), strict=True):
        new.copy_(old)
    truth = exact(prompt[None]).logits[0, -1]
    runner = AttentionRunner(rounded, 1, 64)
    *_, done = runner.prefill(prompt[:-1])
    assert done is not None
    runner.place(0, done.state)
    found = runner.step(prompt[-1:], 6)[0].float()
    allowed = 2 * ((theirs - truth).abs().amax() + 2**-8 * truth.abs().amax())
    assert float((found - truth).abs().amax()) <= float(allowed)


# Refusals
REFUSED = sorted(FAMILIES.keys() - {*MODEL_TYPES, "mamba"})


@pytest.mark.parametrize("kind", REFUSED)
def test_other_families_are_refused_before_weights_are_read(kind, tokenizer, tmp_path):
    config_of(kind, {}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"does not serve model type '{kind}'; .*: use vLLM"):
        LocalEngine(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'.* llama with 'silu' or 'swish'"),
        ("mistral", {}, "sliding_window of 8"),
        ("mixtral", {"sliding_window": 8}, "sliding_window of 8"),
        ("qwen2", {}, "sliding_window of 8"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window of 8"),
        ("olmoe", {"clip_qkv": 4.0}, "clip_qkv is 4.0"),
        ("llama", {"attention_chunk_size": 8}, "attention_chunk_size is 8"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "of chunked_attention"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type is 'dynamic'",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    **{"rope_type": "default", "rope_theta": 1e4},
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor is 0.5",
        ),
    ],
)
def test_what_a_step_does_not_compute_is_refused(kind, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        AttentionRunner.check(config_of(kind, changes), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        # the window is there, no block uses it
        ("qwen2", {"max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 8}),
        ("mistral", {"sliding_window": 512}),
        ("llama", {"hidden_act": "swish"}),
    ],
)
def test_what_changes_nothing_is_served(kind, changes):
    assert AttentionRunner.check(config_of(kind, changes), None) == 512
