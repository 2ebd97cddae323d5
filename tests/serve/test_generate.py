"""generate: transformers' own output, a seed that repeats, and prompts that cannot be used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lillama
from lillama.errors import InputError

KINDS = ["mixtral", "mamba"]
PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def compressed(mixtral: Path, text_file: Path, tmp_path_factory, device) -> Path:
    out = tmp_path_factory.mktemp("generate") / "out"
    lillama.compress(
        mixtral,
        out,
        reduction=0.2,
        text=text_file,
        tokens=300,
        seq_len=32,
        train=False,
        device=str(device),
    )
    return out


@pytest.mark.parametrize("kind", [*KINDS, "compressed"])
def test_generate_greedy_equals_transformers(kind, request, tokenizer, device):
    path = request.getfixturevalue(kind)
    model: Any = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt").to(device)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    wanted = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found = lillama.generate(path, PROMPT, max_new_tokens=12, device=str(device))
    assert found == wanted and found


def test_generate_greedy_ignores_the_seed(mamba, device):
    options = {"max_new_tokens": 8, "device": str(device)}
    assert lillama.generate(mamba, PROMPT, seed=1, **options) == lillama.generate(
        mamba, PROMPT, seed=2, **options
    )


def test_generate_temperature_repeats_with_its_seed(mixtral, device):
    def sample(seed: int) -> str:
        return lillama.generate(
            mixtral, PROMPT, max_new_tokens=16, temperature=1.0, seed=seed, device=str(device)
        )

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_generate_small_temperature_is_nearly_greedy(mixtral, device):
    options = {"max_new_tokens": 8, "device": str(device)}
    greedy = lillama.generate(mixtral, PROMPT, **options)
    assert lillama.generate(mixtral, PROMPT, temperature=1e-4, **options) == greedy


def test_generate_does_not_seed_the_caller(mamba, device):
    torch.manual_seed(123)
    lillama.generate(mamba, PROMPT, max_new_tokens=2, temperature=1.0, device=str(device))
    assert torch.initial_seed() == 123


def test_generate_prompt_beyond_the_positions_is_refused(mixtral):
    with pytest.raises(InputError, match=r"prompt \(\d+ tokens\) and --max-new-tokens \(510\)"):
        lillama.generate(mixtral, PROMPT, max_new_tokens=510)


def test_generate_mamba_has_no_limit_of_positions(mamba, device):
    long = "the cat sat on a mat " * 120
    assert isinstance(lillama.generate(mamba, long, max_new_tokens=1, device=str(device)), str)


def test_generate_tokenizer_of_another_model_is_refused(make_checkpoint):
    with pytest.raises(InputError, match="the model has 100; they do not belong together"):
        lillama.generate(make_checkpoint("mamba", vocab_size=100), PROMPT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "--prompt must not be empty"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "--temperature must be a finite number >= 0, got -0.5"),
        ({"temperature": float("nan")}, "--temperature must be a finite number >= 0, got nan"),
        ({"device": "cuda:99"}, "--device cuda:99 is not available"),
    ],
)
def test_generate_refuses_values_out_of_range(options, message, mamba):
    with pytest.raises(InputError) as caught:
        lillama.generate(mamba, **{"prompt": PROMPT, **options})
    assert message in str(caught.value)


def test_generate_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a checkpoint: it has no config.json"):
        lillama.generate(tmp_path, PROMPT)
