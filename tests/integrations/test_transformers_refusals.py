"""What must not load: damaged factors, configs that do not fit, and any load without lillama."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lillama
from lillama.checkpoint.headers import read_headers
from lillama.errors import InputError
from lillama.integrations.transformers import LillamaConfig, attach_quantizer, register

EXPERTS = "model.layers.0.block_sparse_moe.experts"
RANKS = {
    "mixtral": {
        f"{EXPERTS}.{e}.{w}": 8 * (1 + e % 2)
        for e in range(4)
        for w in ("w1", "w2", "w3")
        if (e, w) != (2, "w3")
    },
    "mamba": {"backbone.layers.0.mixer.in_proj": 8, "backbone.layers.1.mixer.out_proj": 16},
}
FACTOR = {"mixtral": f"{EXPERTS}.1.w2", "mamba": "backbone.layers.0.mixer.in_proj"}
UNRANKED = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.0.w1",
    "mamba": "backbone.layers.1.mixer.in_proj",
}


@pytest.fixture(scope="module")
def originals(make_low_rank, text_file, tmp_path_factory, request) -> dict[tuple, Path]:
    """One intact folder a family and writer."""
    folders = {}
    for kind in ("mixtral", "mamba"):
        path = tmp_path_factory.mktemp(kind)
        folders[kind, "save_pretrained"] = path / "saved"
        make_low_rank(kind, RANKS[kind]).save_pretrained(path / "saved")
        folders[kind, "compress"] = path / "compressed"
        lillama.compress(
            request.getfixturevalue(kind), path / "compressed", reduction=0.3, text=text_file,
            tokens=64, seq_len=16, train=False, gauge="plain",
        )  # fmt: skip
    return folders


@pytest.fixture(params=["mixtral", "mamba"])
def kind(request) -> str:
    return request.param


@pytest.fixture(params=["save_pretrained", "compress"])
def folder(request, originals, kind, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(originals[kind, request.param], tmp_path / "model")


@pytest.fixture
def saved(originals, kind, tmp_path) -> Path:
    return shutil.copytree(originals[kind, "save_pretrained"], tmp_path / "model")


def edit(folder: Path, name: str, change: Callable[[Tensor], Tensor | None], new: str = "") -> None:
    """Change one tensor, drop it (None), or store the result as `new` beside it."""
    file = read_headers(folder)[name].file
    tensors = load_file(file)
    value = change(tensors[name].clone())
    if value is None:
        del tensors[name]
    else:
        tensors[new or name] = value.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(values)
    file.write_text(json.dumps(config))


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match):
        AutoModelForCausalLM.from_pretrained(folder)


# Factors
def test_intact_folder_loads(folder):
    assert AutoModelForCausalLM.from_pretrained(folder) is not None


@pytest.mark.parametrize("key", ["lr_A", "lr_B"])
def test_missing_factor_is_named(folder, kind, key):
    name = f"{FACTOR[kind]}.{key}"
    edit(folder, name, lambda tensor: None)
    refused(folder, f"missing factors: {re.escape(name)}$")


def test_extra_factor_is_named(saved, kind):
    name = f"{UNRANKED[kind]}.lr_A"
    edit(saved, f"{FACTOR[kind]}.lr_A", lambda tensor: tensor, new=name)
    refused(saved, f"unexpected factors: {re.escape(name)}$")


@pytest.mark.parametrize(
    "change",
    [lambda t: t.T, lambda t: t[:-1], lambda t: t.flatten(), lambda t: t[None]],
    ids=["transposed", "smaller", "flat", "more-axes"],
)
@pytest.mark.parametrize("key", ["lr_A", "lr_B"])
def test_mis_shaped_factor_is_named(folder, kind, key, change):
    name = f"{FACTOR[kind]}.{key}"
    edit(folder, name, change)
    refused(folder, f"mis-shaped factors: {re.escape(name)} .* instead of")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["lr_A", "lr_B"])
def test_factor_with_nan_or_infinity_is_named(folder, kind, key, value):
    name = f"{FACTOR[kind]}.{key}"
    edit(folder, name, with_value(value))
    refused(folder, f"{re.escape(name)} holds NaN or infinity")


def test_bias_with_nan_is_named(make_low_rank, tmp_path):
    make_low_rank("mamba", RANKS["mamba"], use_bias=True).save_pretrained(tmp_path)
    edit(tmp_path, "backbone.layers.0.mixer.in_proj.bias", with_value(float("nan")))
    refused(tmp_path, r"layers\.0\.mixer\.in_proj\.bias holds NaN")


def test_missing_bias_is_named(make_low_rank, tmp_path):
    make_low_rank("mamba", RANKS["mamba"], use_bias=True).save_pretrained(tmp_path)
    edit(tmp_path, "backbone.layers.0.mixer.in_proj.bias", lambda tensor: None)
    refused(tmp_path, r"layers\.0\.mixer\.in_proj\.bias is missing")


DENSE = f"{EXPERTS}.2.w3.lr_W"
DENSE_DAMAGE = {
    "missing": (lambda tensor: None, f"missing factors: {DENSE}"),
    "smaller": (lambda tensor: tensor[:-1], f"mis-shaped factors: {DENSE} .63, 32. instead of"),
    "nan": (with_value(float("nan")), f"{DENSE} holds NaN"),
}


@pytest.mark.parametrize("damage", DENSE_DAMAGE)
def test_dense_expert_matrix_damaged_is_named(originals, tmp_path, damage):
    folder = shutil.copytree(originals["mixtral", "save_pretrained"], tmp_path / "model")
    edit(folder, DENSE, DENSE_DAMAGE[damage][0])
    refused(folder, DENSE_DAMAGE[damage][1])


@pytest.mark.parametrize("name", [f"{EXPERTS}.1.w3.lr_W", f"{EXPERTS}.7.w3.lr_W"])
def test_dense_expert_matrix_extra_is_named(originals, tmp_path, name):
    folder = shutil.copytree(originals["mixtral", "save_pretrained"], tmp_path / "model")
    edit(folder, DENSE, lambda tensor: tensor, new=name)
    refused(folder, f"unexpected factors: {re.escape(name)}$")


def test_mis_shaped_dense_tensor_raises(saved, kind):
    name = "lm_head.weight" if kind == "mixtral" else "backbone.layers.1.mixer.in_proj.weight"
    edit(saved, name, lambda tensor: tensor[:-1])
    with pytest.raises((InputError, RuntimeError), match="has shape|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(saved)


# quantization_config
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rnaks": {}}, r"unknown keys \['rnaks'\]"),
        ({"format_version": 2}, "format_version must be 3, got 2; .* again, or"),
        ({"sentinel": None}, "must name the sentinel, got None; compress again, or"),
        ({"sentinel": 3}, "must name the sentinel, got 3"),
        ({"format_version": None}, "format_version must be 3, got None"),
        ({"gauge": "orthogonal"}, "gauge must be one of plain, pivot, got 'orthogonal'"),
        ({"ranks": {}}, "has no ranks"),
        ({"ranks": None}, "has no ranks"),
        ({"ranks": {"x": "8"}}, "rank of x must be a positive integer, got '8'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_config_that_cannot_be_read_raises(saved, values, message):
    edit_config(saved, **values)
    refused(saved, message)


UNKNOWN = {
    "mixtral": [f"{EXPERTS}.4.w1", "model.layers.2.block_sparse_moe.experts.0.w1", "model.nothing"],
    "mamba": ["backbone.layers.2.mixer.in_proj", "backbone.layers.0.mixer.no_proj", "in_proj"],
}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_rank_names_that_do_not_exist_raise(saved, kind, index):
    name = UNKNOWN[kind][index]
    edit_config(saved, ranks={**RANKS[kind], name: 8})
    refused(saved, f"quantization_config names {re.escape(name)}, which is no matrix of this model")


def test_rank_of_something_that_is_no_matrix_raises(originals, tmp_path):
    folder = shutil.copytree(originals["mamba", "save_pretrained"], tmp_path / "model")
    for name in ("backbone.layers.0.mixer.conv1d", "backbone.layers.0.norm"):
        edit_config(folder, ranks={**RANKS["mamba"], name: 4})
        refused(folder, re.escape(name))


def test_rank_that_differs_from_the_factors_raises(folder, kind):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    rank = config["ranks"][FACTOR[kind]]
    edit_config(folder, ranks={**config["ranks"], FACTOR[kind]: rank + 8})
    refused(folder, f"mis-shaped factors: {re.escape(FACTOR[kind])}")


def test_lillama_config_for_a_dense_checkpoint_raises(request, kind):
    path = request.getfixturevalue(kind)
    with pytest.raises(ValueError, match="pre-quantized|calibration|quantized"):
        AutoModelForCausalLM.from_pretrained(
            path, quantization_config=LillamaConfig(ranks=RANKS[kind], sentinel="a")
        )


def test_lillama_config_rejects_unknown_keys():
    with pytest.raises(InputError, match=r"unknown keys \['rank'\].*newer lillama"):
        LillamaConfig(ranks={"a": 8}, rank=3)


def test_register_twice_is_fine(originals):
    register()
    register()
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZER_MAPPING["lillama"].__name__ == "LillamaQuantizer"


def test_attach_quantizer_writes_the_config(make_model, tmp_path):
    model = make_model("mamba")
    origin = {"reduction": 0.25, "base_model": "base", "tokens": 7}
    config = LillamaConfig(ranks={"a": 8}, sentinel="a.weight", **origin)
    attach_quantizer(model, config)
    model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "lillama" and written["format_version"] == 3
    assert (written["ranks"], written["tokens"]) == ({"a": 8}, 7)
    assert written["sentinel"] == "a.weight"
    assert LillamaConfig(**written).to_dict() == config.to_dict()


# Without lillama
WITHOUT = """
import json, sys
from transformers import AutoModelForCausalLM
results = {}
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
        results[path] = "loaded"
    except Exception as error:
        results[path] = type(error).__name__ + ": " + str(error)
assert not any(name.split(".")[0] == "lillama" for name in sys.modules)
import lillama, importlib
importlib.reload(lillama)
AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(json.dumps(results))
"""


def run_python(code: str, *args: object) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONSTARTUP"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_load_without_lillama_raises(originals, make_low_rank, tmp_path):
    paths = list(originals.values())
    for kind in ("mixtral", "mamba"):
        # ranks that start in a later layer, and the names transformers uses in memory
        ranks = {name.replace("layers.0", "layers.1"): rank for name, rank in RANKS[kind].items()}
        paths.append(tmp_path / kind)
        make_low_rank(kind, ranks).save_pretrained(paths[-1], save_original_format=False)
    results = json.loads(run_python(WITHOUT, *paths))
    assert list(results) == [str(path) for path in paths]
    for path, result in results.items():
        assert "ignore_mismatched_sizes" in result, f"{path}: {result}"


def test_mis_shaped_sentinel_is_the_only_reason_a_load_without_lillama_raises(saved, kind):
    """Were the sentinel gone, lillama itself would still load the model: nothing else needs it."""
    names = [name for name, header in read_headers(saved).items() if header.num_bytes == 4]
    assert len(names) == 1
    before = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    edit(saved, names[0], lambda tensor: None)
    after = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
