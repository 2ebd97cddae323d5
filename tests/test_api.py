"""The public names: functions with the documented defaults, whatever was imported before."""

import dataclasses
import importlib
import inspect
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import lillama
from lillama.checkpoint.compression import FORMAT_VERSION
from lillama.config import PRESETS, PlanConfig
from lillama.errors import InputError, LillamaError, RunError

SUBMODULES = [
    "lillama.compress",
    "lillama.compress.teacher.blocks",
    "lillama.compress.plan.plan",
    "lillama.compress.pipeline",
    "lillama.evaluate",
    "lillama.checkpoint.export",
    "lillama.serve.generate",
    "lillama.report",
    "lillama.cli.app",
]


def test_api_names_stay_functions_after_importing_submodules():
    for module in SUBMODULES:
        importlib.import_module(module)
    for name in ("compress", "plan", "eval", "export", "generate", "report"):
        assert inspect.isfunction(getattr(lillama, name)), name


def test_api_all_lists_every_public_name():
    assert sorted(lillama.__all__) == list(lillama.__all__)
    assert set(lillama.__all__) <= set(dir(lillama))
    errors = {"InputError", "LillamaError", "RunError"}
    for name in set(lillama.__all__) - errors - {"__version__"}:
        assert inspect.isfunction(getattr(lillama, name)), name


def _python(code: str) -> str:
    """What a new interpreter prints."""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def test_import_loads_nothing_heavy():
    code = """
        import sys, lillama, lillama.cli
        heavy = ("torch", "transformers", "triton", "numpy")
        print([name for name in heavy if name in sys.modules])
    """
    assert _python(inspect.cleandoc(code)) == "[]"


@pytest.mark.parametrize(
    "first",
    [
        *("lillama", "lillama.compress.pipeline"),
        # four seconds each
        *(
            pytest.param(f"transformers{part}", marks=pytest.mark.full)
            for part in ("", ".modeling_layers")
        ),
    ],
)
def test_transformers_knows_the_format_whoever_is_imported_first(first):
    code = f"""
        import {first}
        import transformers, lillama
        from transformers import PreTrainedModel
        from transformers.quantizers.auto import AutoHfQuantizer
        values = dict(quant_method="lillama", format_version={FORMAT_VERSION}, ranks=dict(a=1))
        found = AutoHfQuantizer.from_config(values | dict(sentinel="a.weight"))
        print(type(found).__name__, type(found.quantization_config).__name__)
    """
    assert _python(inspect.cleandoc(code)) == "LillamaQuantizer LillamaConfig"


def test_help_and_version_start_in_half_a_second():
    """Each the best of three, in CPU time: other tests may run beside this one."""
    for option in ("--help", "--version"):
        code = (
            f"import sys; sys.argv = ['lillama', '{option}']; from lillama.cli import main; main()"
        )
        spent = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert _python(code)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(spent) < 0.5


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


def test_api_plan_defaults_are_those_of_the_config():
    parameters = inspect.signature(lillama.plan).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    fields = {field.name: field.default for field in dataclasses.fields(PlanConfig)}
    assert found and found.items() <= fields.items()


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
        ({"reduction": -1.0}, "--reduction must lie between 0 and 1"),
        ({"reduction": float("inf")}, "--reduction must lie between 0 and 1"),
        ({"reduction": float("nan")}, "--reduction must lie between 0 and 1"),
        (
            {"preset": "bset"},
            "--preset must be one of default, fast, best, whitened, paper, got 'bset'",
        ),
        (
            {"strategy": "middle"},
            "--strategy must be one of global, uniform, bottom, got 'middle'",
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
