"""The public names: functions with the documented defaults, whatever was imported before."""

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

import lillama
from lillama.config import (
    PRESETS,
    CompressConfig,
    ExportConfig,
    GenerateConfig,
    PlanConfig,
    ReportConfig,
)
from lillama.config_advice import AdviceConfig
from lillama.config_eval import EvalConfig
from lillama.config_finetune import FinetuneConfig
from lillama.config_serve import ServeConfig
from lillama.errors import InputError, LillamaError, RunError

SUBMODULES = [
    "lillama.compress",
    "lillama.compress.blocks",
    "lillama.compress.plan",
    "lillama.compress.pipeline",
    "lillama.evaluate",
    "lillama.export",
    "lillama.serve.generate",
    "lillama.report",
    "lillama.cli",
]


@pytest.mark.parametrize("name", ["compress", "plan", "eval", "export", "generate", "report"])
def test_api_names_stay_functions_after_importing_submodules(name):
    for module in SUBMODULES:
        importlib.import_module(module)
    assert inspect.isfunction(getattr(lillama, name))


def test_api_all_lists_every_public_name():
    assert sorted(lillama.__all__) == list(lillama.__all__)
    public = {
        name
        for name, value in vars(lillama).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and not hasattr(value, "compiler_flag")
    }
    assert public == set(lillama.__all__) - {"__version__"}
    assert isinstance(lillama.__version__, str)


def test_api_submodules_all_name_things_that_exist():
    for name in SUBMODULES[1:]:
        module = importlib.import_module(name)
        # `lillama.generate` the attribute is the function, sys.modules has the module
        assert inspect.ismodule(module)
        for public in module.__all__:
            assert hasattr(module, public), f"{name}.{public}"


def test_api_kernels_impl_is_exported_and_checks_its_name():
    with pytest.raises(ValueError, match="impl must be one of"), lillama.kernels_impl("fast"):  # type: ignore[arg-type]
        pass


def test_presets_say_how_many_tokens_and_which_gauge():
    found = {name: (recipe.tokens, recipe.gauge) for name, recipe in PRESETS.items()}
    assert found == {
        "default": (2_000_000, "pivot"),
        "fast": (262_144, "pivot"),
        "best": (2_000_000, "pivot"),
        "whitened": (2_000_000, "plain"),
        "paper": (2_000_000, "plain"),
    }
    assert PlanConfig(model=Path("m"), reduction=0.2, preset="fast").num_tokens == 262_144
    assert PlanConfig(model=Path("m"), reduction=0.2, tokens=7).num_tokens == 7


def test_fast_takes_tokens_in_proportion_to_the_width():
    fast = PlanConfig(model=Path("m"), reduction=0.2, preset="fast")
    assert [fast.at_width(size).num_tokens for size in (64, 256, 512, 1024, 4096)] == [
        65_536, 65_536, 131_072, 262_144, 262_144,
    ]  # fmt: skip
    assert dataclasses.replace(fast, tokens=10**7).at_width(4096).num_tokens == 2**20
    assert dataclasses.replace(fast, tokens=100).at_width(128).tokens == 100
    assert [fast.recipe.gradient_tokens(size) for size in (64, 256, 512, 1024, 4096)] == [
        16_384, 16_384, 32_768, 65_536, 65_536,
    ]  # fmt: skip
    default = PlanConfig(model=Path("m"), reduction=0.2)
    assert default.at_width(128) is default and default.recipe.gradient_tokens(128) == 65_536


def test_api_errors_have_the_exit_codes():
    assert (InputError.exit_code, RunError.exit_code) == (2, 1)
    assert issubclass(InputError, LillamaError) and issubclass(RunError, LillamaError)
    assert issubclass(InputError, ValueError) and issubclass(RunError, RuntimeError)


# What the options are and what they default to: a change here is a change for every user.
DEFAULTS = {
    CompressConfig: {
        "text": (),
        "preset": "default",
        "strategy": None,
        "targets": None,
        "gauge": None,
        "budget": "stored",
        "tokens": None,
        "seq_len": 512,
        "loss": "joint",
        "packing": True,
        "train": True,
        "seed": 0,
        "dtype": "auto",
        "device": "auto",
        "activation_memory": 4 * 2**30,
        "checkpoint_seconds": 600.0,
        "events": None,
        "overwrite": False,
    },
    PlanConfig: {
        "preset": "default",
        "strategy": None,
        "targets": None,
        "gauge": None,
        "budget": "stored",
        "tokens": None,
        "seq_len": 512,
        "train": True,
        "activation_memory": 4 * 2**30,
    },
    AdviceConfig: {
        "text": (),
        "reduction": None,
        "preset": None,
        "retain": 0.95,
        "targets": None,
        "gauge": None,
        "tokens": None,
        "seq_len": 512,
        "activation_memory": 4 * 2**30,
        "device": "auto",
        "max_hours": 24.0,
    },
    EvalConfig: {
        "text": (),
        "against": None,
        "metric": "blocks",
        "seq_len": None,
        "batch_size": 8,
        "tasks": (),
        "task_path": None,
        "limit": None,
        "generations": 0,
        "speed": False,
        "dtype": "auto",
        "device": "auto",
    },
    ExportConfig: {"format": "dense"},
    FinetuneConfig: {
        "tokens": 2_000_000,
        "own_tokens": 0,
        "seq_len": 512,
        "batch_size": 8,
        "packing": True,
        "epochs": 1,
        "learning_rate": None,
        "seed": 0,
        "device": "auto",
        "overwrite": False,
        "evaluations": 8,
    },
    GenerateConfig: {"max_new_tokens": 128, "temperature": 0.0, "seed": 0, "device": "auto"},
    ReportConfig: {"events": None, "eval": None, "png": None, "open": False},
    ServeConfig: {
        "host": "127.0.0.1",
        "port": 8000,
        "device": "auto",
        "dtype": "auto",
        "max_batch": 8,
        "max_queue": 64,
        "max_length": None,
        "served_name": None,
        "api_key_file": None,
        "request_timeout_s": 600.0,
        "client_timeout_s": 20.0,
        "drain_s": 30.0,
        "max_body_bytes": 2 * 2**20,
        "max_connections": 512,
        "max_choices": 16,
    },
}


@pytest.mark.parametrize("config", DEFAULTS, ids=lambda config: config.__name__)
def test_config_defaults_are_the_documented_ones(config):
    found = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING
    }
    assert found == DEFAULTS[config]


def test_api_plan_defaults_are_those_of_the_config():
    parameters = inspect.signature(lillama.plan).parameters
    found = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert found.items() <= DEFAULTS[PlanConfig].items()


@pytest.mark.parametrize("name", ["compress", "eval", "finetune", "generate", "plan", "report"])
def test_api_unknown_option_is_refused(name, tmp_path):
    arguments = {
        "compress": {"reduction": 0.2, "text": "t"},
        "plan": {"reduction": 0.2},
        "eval": {"text": "t"},
        "generate": {"prompt": "p"},
        "finetune": {"base": "b", "text": "t"},
        "report": {},
    }[name]
    target = {"out": tmp_path / "out"} if name in ("compress", "finetune") else {}
    with pytest.raises(TypeError, match="rank_step"):
        getattr(lillama, name)(tmp_path, **target, **arguments, rank_step=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0.0}, "--reduction must lie between 0 and 1"),
        ({"reduction": 1.0}, "--reduction must lie between 0 and 1"),
        ({"reduction": float("nan")}, "--reduction must lie between 0 and 1"),
        (
            {"preset": "bset"},
            "--preset must be one of default, fast, best, whitened, paper, got 'bset'",
        ),
        (
            {"strategy": "middle"},
            "--strategy must be one of global, uniform, bottom, top, got 'middle'",
        ),
        ({"loss": "both"}, "--loss must be one of joint, teacher, student, got 'both'"),
        ({"dtype": "int8"}, "--dtype must be one of auto, float32, float16, bfloat16, got 'int8'"),
        ({"device": "tpu"}, "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "cuda:first"}, "--device must be auto, cpu, cuda or cuda:N, got 'cuda:first'"),
        ({"device": "cpu:1"}, "--device must be auto, cpu, cuda or cuda:N, got 'cpu:1'"),
        ({"tokens": 0}, "--tokens must be at least 1, got 0"),
        ({"seq_len": 1}, "--seq-len must be at least 2, got 1"),
    ],
)
def test_api_compress_refuses_values_out_of_range(options, message, tmp_path):
    arguments = {"reduction": 0.2, "text": "t.txt", **options}
    with pytest.raises(InputError) as caught:
        lillama.compress(tmp_path, tmp_path / "out", **arguments)
    assert message in str(caught.value)
