"""The layout as tests: which way imports run, what files are called, how long they are."""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from lillama import cli

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "lillama_kernels"

# Lowest first. A part imports from the layers below its own and from itself; the leaves also from
# each other. So compress and serve never meet, and nothing imports cli.
LEAVES = {"checkpoint", "checkpoint_writer", "config", "data", "errors", "families", "journal"}
LEAVES |= {"config_eval", "config_serve", "documents", "hub", "hub_checkpoint", "hub_text"}
LEAVES |= {"shard_file", "skeleton", "version"}
LEAVES |= {"config_advice", "config_finetune"}
LEAVES |= {"audio", "speech"}
LEAVES |= {"pivots"}
LAYERS = (
    LEAVES,
    {"modules"},
    {"families_generic"},
    {"integrations"},
    {"loading"},
    {"sample"},
    {"compress", "serve"},
    {"evaluate_generations", "evaluate_speed", "evaluate_tasks", "evaluate_text"},
    {"evaluate", "export", "generate", "report_data", "report_svg", "upstream_files"},
    {"report_spectra"},
    {"report_plots", "report_sections", "upstream"},
    {"report_page"},
    {"report"},
    {"cli_options", "cli_output"},
    {"cli_advice"},
    {"cli_eval", "cli_plan", "cli_report", "cli_sample", "cli_serve", "cli_upstream"},
    {"cli"},
)
# Parts that import the extra lillama[serve], and what each of its packages is imported as; jinja2
# comes with torch, starlette and pydantic with fastapi.
SERVE_EXTRA = {"fastapi", "jinja2", "prometheus_client", "pydantic", "starlette", "uvicorn"}
# Files that import the extra lillama[report], which is matplotlib
REPORT_EXTRA = {"report_plots.py", "report_spectra.py", "report_svg.py"}
# Files that import the extra lillama[eval]
EVAL_EXTRA = {"evaluate_tasks.py"}
# The file that imports the extra lillama[data], which is datasets
DATA_EXTRA = {"hub_text.py"}
TERMINAL = {
    "cli.py",
    "cli_advice.py",
    "cli_eval.py",
    "cli_options.py",
    "cli_output.py",
    "cli_plan.py",
    "cli_report.py",
    "cli_sample.py",
    "cli_serve.py",
    "cli_upstream.py",
}

FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# What was over the limits when this test was written. Nothing is added here: split it instead.
LONG = {"tests/test_data.py", "examples/train_teacher.py:main"}

OPTIONS = {
    "compress": "--activation-memory --budget --checkpoint-seconds --device --dtype --events "
    "--gauge --json --loss --overwrite --packing --preset --reduction --revision --seed --seq-len "
    "--strategy --targets --text --tokens --train",
    "plan": "--activation-memory --advise --budget --device --gauge --json --preset --reduction "
    "--retain --revision --seq-len --strategy --targets --text --tokens --train",
    "finetune": "--base --batch-size --device --epochs --json --learning-rate --overwrite "
    "--own-tokens --packing --revision --seed --seq-len --text --tokens",
    "eval": "--against --batch-size --device --dtype --generations --json --limit --metric "
    "--revision --seq-len --speed --task-path --tasks --text",
    "export": "--format --json --revision",
    "import-upstream": "--base --json",
    "generate": "--device --max-new-tokens --prompt --revision --seed --temperature",
    "report": "--eval --events --open --png",
    "sample": "--batch-size --device --json --revision --seed --seq-len --temperature --tokens",
    "serve": "--api-key-file --client-timeout-s --device --drain-s --dtype --host --max-batch "
    "--max-body-bytes --max-choices --max-connections --max-length --max-queue --port "
    "--request-timeout-s --revision --served-name",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def files_in(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


LIBRARY = files_in("lillama", "kernels")
EVERYTHING = files_in("lillama", "kernels", "tests", "benchmarks", "examples")
# Imports vLLM, an extra that is seldom installed: looked at, not imported
PLUGIN = ROOT / "lillama" / "integrations" / "vllm"
each_library_file = pytest.mark.parametrize("path", LIBRARY, ids=name_of)
each_file = pytest.mark.parametrize("path", EVERYTHING, ids=name_of)


def module_of(path: Path) -> str:
    """lillama/compress/plan.py -> lillama.compress.plan"""
    root = KERNELS.parent if KERNELS in path.parents else ROOT
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in LIBRARY}


def is_http(path: Path) -> bool:
    """Files of the HTTP server, which needs lillama[serve]; http.py says so where it is missing."""
    return path.parent.name == "serve" and path.name.startswith("http_")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports_of(path: Path) -> Iterator[str]:
    """Every module imported anywhere in a file, inside functions too."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def top(module: str) -> str:
    return module.partition(".")[0]


def part_of(module: str) -> str:
    """lillama.compress.plan -> compress; the package itself -> ''"""
    return module.split(".")[1] if "." in module else ""


def layer_of(part: str) -> int:
    for layer, parts in enumerate(LAYERS):
        if part in parts:
            return layer
    raise AssertionError(f"lillama/{part} belongs to no layer yet; add it to LAYERS")


def may_import(importer: str, imported: str) -> bool:
    if importer == imported or {importer, imported} <= LEAVES:
        return True
    return layer_of(imported) < layer_of(importer)


def declared_dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return {re.split(r"[^\w-]", line, maxsplit=1)[0] for line in project["dependencies"]}


# Which way imports run
@pytest.mark.parametrize("path", files_in("kernels"), ids=name_of)
def test_kernels_import_torch_triton_and_themselves_only(path: Path) -> None:
    allowed = {"torch", "triton", "lillama_kernels"} | sys.stdlib_module_names
    assert {top(name) for name in imports_of(path)} <= allowed
    ours = {name for name in imports_of(path) if top(name) == "lillama_kernels"}
    if path.stem in ("dispatch", "reference"):
        assert not ours, "the reference and the rule stand alone"
    assert "lillama_kernels.testing" not in ours, "testing is for tests and benchmarks"


@pytest.mark.parametrize("path", files_in("lillama"), ids=name_of)
def test_lillama_imports_run_one_way(path: Path) -> None:
    importer = part_of(module_of(path))
    for name in imports_of(path):
        if top(name) == "lillama_kernels":
            assert name != "lillama_kernels.testing", "testing is for tests and benchmarks"
            assert importer not in LEAVES, f"{importer} is a leaf and imports {name}"
        if top(name) != "lillama":
            continue
        imported = part_of(name)
        assert imported, "importing the package itself closes a circle; import the module"
        if not importer:
            assert imported != "cli"
            continue
        assert may_import(importer, imported), f"{importer} imports {name}"


@pytest.mark.parametrize("path", files_in("lillama"), ids=name_of)
def test_lillama_imports_declared_dependencies_only(path: Path) -> None:
    known = declared_dependencies() | sys.stdlib_module_names | {"lillama", "lillama_kernels"}
    names = {top(name) for name in imports_of(path)}
    known |= SERVE_EXTRA if is_http(path) else set()
    known |= {"matplotlib"} if path.name in REPORT_EXTRA else set()
    known |= {"lm_eval"} if path.name in EVAL_EXTRA else set()
    known |= {"datasets"} if path.name in DATA_EXTRA else set()
    known |= {"vllm"} if PLUGIN in path.parents else set()
    assert names <= known
    if path.name not in TERMINAL:
        assert not names & {"typer", "rich"}, "the terminal belongs to cli.py"


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("cli", "compress", True),
        ("compress", "modules", True),
        ("evaluate", "loading", True),
        ("checkpoint", "families", True),
        ("compress", "serve", False),
        ("serve", "compress", False),
        ("cli", "cli_serve", True),
        ("cli_serve", "serve", True),
        ("report", "report_plots", True),
        ("report_svg", "report_page", False),
        ("cli_options", "cli_serve", False),
        ("modules", "integrations", False),
        ("checkpoint", "modules", False),
        ("config", "compress", False),
        ("evaluate", "generate", False),
        ("generate", "cli", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) == allowed


# Names and sizes
def test_kernels_is_a_folder_and_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"
    assert not (ROOT / "tests" / "kernels").exists(), "it would shadow Hugging Face's kernels"
    assert not list((ROOT / "tests").rglob("__init__.py"))


@each_file
def test_names_say_what_a_file_is_about(path: Path) -> None:
    words = set(path.relative_to(ROOT).with_suffix("").parts)
    words |= {word.removeprefix("test_").removeprefix("bench_") for word in words}
    assert not words & FORBIDDEN_NAMES


def too_long(path: Path) -> Iterator[str]:
    text = path.read_text("utf-8")
    if len(text.splitlines()) >= MAX_FILE_LINES:
        yield name_of(path)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        first = node.body[0]
        if ast.get_docstring(node) is not None and first.end_lineno is not None:
            lines -= first.end_lineno - first.lineno + 1
        if lines >= MAX_FUNCTION_LINES:
            yield f"{name_of(path)}:{node.name}"


def test_files_and_functions_are_short() -> None:
    """Files under 400 lines, functions under 60, the docstring not counted."""
    assert {name for path in EVERYTHING for name in too_long(path)} == LONG


def sort_key(name: str) -> tuple[int, str]:
    """ruff's RUF022: constants, then classes, then the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def exported(path: Path) -> tuple[list[str], set[str]]:
    """`__all__` of a module, and the names that it has."""
    if PLUGIN not in path.parents:
        module = importlib.import_module(module_of(path))
        return list(module.__all__), set(vars(module))
    names, found = [], set()
    for node in parse(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            if "__all__" in found and not names:
                names = ast.literal_eval(node.value)
    return names, found


@each_library_file
def test_all_lists_names_that_exist(path: Path) -> None:
    if not path.read_text("utf-8").strip():
        return
    if is_http(path):
        pytest.importorskip("fastapi", reason="needs lillama[serve]")
    names, found = exported(path)
    assert names == sorted(set(names), key=sort_key)
    assert [name for name in names if name not in found] == []


def test_readme_lists_every_file_once() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    found = [match[1] for line in lines if (match := re.match(r"    (\S+/\S+\.py) +\S", line))]
    assert sorted(found) == sorted(name_of(p) for p in LIBRARY if p.name != "__init__.py")


def test_options_change_on_purpose_only() -> None:
    commands = getattr(typer.main.get_command(cli.app), "commands")  # noqa: B009
    found = {
        name: " ".join(sorted(o for p in command.params for o in p.opts if o.startswith("--")))
        for name, command in commands.items()
    }
    assert found == OPTIONS


# What the library never does
def forbidden(node: ast.AST) -> str | None:
    if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
        return "trust_remote_code"
    if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
        return "trust_remote_code"
    if isinstance(node, ast.Name | ast.Attribute):
        name = ast.unparse(node)
        if name in ("os.environ", "os.getenv", "os.putenv", "torch.load", "torch.save"):
            return name
    return None


@each_library_file
def test_no_remote_code_no_pickle_no_environment(path: Path) -> None:
    assert not {top(name) for name in imports_of(path)} & {
        *("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
    }
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {alias.name for alias in node.names} & {"environ", "getenv", "putenv"}
        if path.name == "ranks.py" and forbidden(node) == "os.environ":
            continue  # torchrun tells its workers who they are in no other way
        if path.name == "upstream_files.py" and forbidden(node) == "torch.load":
            continue  # what the published code wrote; the next test sees how it is read
        assert forbidden(node) is None, f"line {getattr(node, 'lineno', '?')}: {forbidden(node)}"


def test_the_only_torch_load_takes_tensors_alone() -> None:
    calls = [
        node
        for node in ast.walk(parse(ROOT / "lillama" / "upstream_files.py"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) == 1
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}
    assert keywords["weights_only"] == "True"


@pytest.mark.parametrize(
    "code",
    [
        "f(trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "os.environ['X']",
        "os.environ.get('X')",
        "os.getenv('X')",
        "torch.load('x')",
    ],
)
def test_the_search_finds(code: str) -> None:
    assert any(forbidden(node) for node in ast.walk(ast.parse(code)))
