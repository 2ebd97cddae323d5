"""The architecture as tests: which way imports run between the folders, what files are called, and
what the library never does. One test a rule; a failure names every file that breaks it."""

import ast
import importlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from lillama.cli import app as cli

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "lillama_kernels"

# Lowest first: a folder imports from the layers below its own and from itself, never from its
# neighbours, so compress and serve meet in the checkpoint alone
LAYERS = (
    {"errors", "version"},
    {"config"},
    {"models"},
    {"checkpoint"},
    {"modules"},
    {"integrations"},
    {"data"},
    {"compress", "serve"},
    {"evaluate", "report"},
    {"cli"},
)
# The same inside compress, where files outside a folder stand above all
COMPRESS = ("plan", "teacher", "session", "measure", "train")
# They know nothing of operations
WITHOUT_KERNELS = {"errors", "version", "config", "models", "checkpoint", "data", "report", "cli"}
# {place: packages of an extra that it alone imports}; jinja2 comes with torch, starlette and
# pydantic with fastapi
EXTRAS = {
    "cli": {"rich", "typer"},
    "data/datasets.py": {"datasets"},
    "evaluate/tasks.py": {"lm_eval"},
    "integrations/vllm": {"vllm"},
    "report": {"matplotlib"},
    "serve/http": {
        *("fastapi", "jinja2", "prometheus_client", "pydantic", "starlette", "uvicorn"),
    },
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
MAX_FUNCTION_LINES = 60
# What was over the limit when this rule was written. Nothing is added here: split it instead.
LONG = {"examples/train_teacher.py:main"}

OPTIONS = {
    "compress": "--activation-memory --budget --checkpoint-seconds --device --dtype --events "
    "--gauge --json --loss --overwrite --packing --preset --reduction --revision --seed --seq-len "
    "--strategy --targets --text --tokens --train",
    "plan": "--activation-memory --budget --gauge --json --preset --reduction --revision --seq-len "
    "--strategy --targets --tokens --train",
    "finetune": "--base --batch-size --device --epochs --json --learning-rate --overwrite "
    "--own-tokens --packing --revision --seed --seq-len --text --tokens",
    "eval": "--against --batch-size --device --dtype --generations --json --limit --metric "
    "--revision --seq-len --speed --task-path --tasks --text",
    "export": "--format --json --revision",
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


def module_of(path: Path) -> str:
    """lillama/compress/plan/plan.py -> lillama.compress.plan.plan"""
    root = KERNELS.parent if KERNELS in path.parents else ROOT
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in LIBRARY}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(parse(path)))


@cache
def imports_of(path: Path) -> set[str]:
    """Every module imported anywhere in a file, inside functions too, but for types alone."""
    tree, found = parse(path), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


def folder_of(module: str) -> str:
    """lillama.compress.plan.plan -> compress; the package itself -> ''"""
    return module.split(".")[1] if "." in module else ""


def layer_of(folder: str) -> int:
    for layer, folders in enumerate(LAYERS):
        if folder in folders:
            return layer
    raise AssertionError(f"lillama/{folder} belongs to no layer yet; add it to LAYERS")


def may_import(importer: str, imported: str) -> bool:
    if not importer:
        return imported != "cli"
    return importer == imported or layer_of(imported) < layer_of(importer)


def declared_dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return {re.split(r"[^\w-]", line, maxsplit=1)[0] for line in project["dependencies"]}


# Which way imports run
def test_kernels_import_torch_triton_and_themselves_only() -> None:
    allowed = {"torch", "triton", "lillama_kernels"} | sys.stdlib_module_names
    for path in files_in("kernels"):
        assert {top(name) for name in imports_of(path)} <= allowed, path
        ours = {name for name in imports_of(path) if top(name) == "lillama_kernels"}
        if path.stem in ("dispatch", "reference"):
            assert not ours, f"{path}: the reference and the rule stand alone"
        assert "lillama_kernels.testing" not in ours, f"{path}: it is for tests and benchmarks"


def test_lillama_imports_run_one_way() -> None:
    for path in files_in("lillama"):
        importer, names = folder_of(module_of(path)), imports_of(path)
        assert "lillama_kernels.testing" not in names, f"{path}: it is for tests and benchmarks"
        assert "lillama" not in names, f"{path}: the package itself closes a circle"
        for name in names:
            imported = folder_of(name)
            if top(name) == "lillama_kernels":
                assert importer not in WITHOUT_KERNELS, f"{path} imports {name}"
            elif top(name) == "lillama":
                assert may_import(importer, imported), f"{path} imports {name}"


def test_compress_imports_run_one_way() -> None:
    def level(module: str) -> int:
        folder = module.split(".")[2] if module.count(".") > 2 else ""
        return COMPRESS.index(folder) if folder in COMPRESS else len(COMPRESS)

    for path in files_in("lillama/compress"):
        own = level(module_of(path))
        for name in imports_of(path):
            if name.startswith("lillama.compress"):
                assert level(name) <= own, f"{path} imports {name}"
    assert level("lillama.compress.plan.plan") == 0 and level("lillama.compress.run") == 5


def test_lillama_imports_declared_dependencies_only() -> None:
    known = declared_dependencies() - {"typer", "rich"}
    known |= sys.stdlib_module_names | {"lillama", "lillama_kernels"}
    for path in files_in("lillama"):
        name = path.relative_to(ROOT / "lillama").as_posix()
        extra = {p for place, found in EXTRAS.items() if name.startswith(place) for p in found}
        assert {top(module) for module in imports_of(path)} <= known | extra, name


def test_the_rule_itself() -> None:
    pairs = "cli compress, compress modules, evaluate serve, checkpoint models, modules checkpoint"
    for importer, imported in (pair.split() for pair in pairs.split(", ")):
        assert may_import(importer, imported) and not may_import(imported, importer)
    for one, other in (("compress", "serve"), ("evaluate", "report")):
        assert not may_import(one, other) and not may_import(other, one)
    assert may_import("", "compress") and not may_import("", "cli")


# Who knows the format
def spelling(node: ast.AST) -> str | None:
    """What a node says of how a factor is spelt on disk."""
    said = None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        said = node.value
    elif isinstance(node, ast.Attribute | ast.Name | ast.keyword):
        said = next(getattr(node, key) for key in ("attr", "id", "arg") if hasattr(node, key))
    found = re.search(r"\blr_(A|B|C|W|pivots|order)\b", said or "")
    return found and found[0]


def test_only_the_checkpoint_knows_how_a_factor_is_spelt() -> None:
    knows = {
        folder_of(module_of(path))
        for path in files_in("lillama")
        if {spelling(node) for node in nodes(path)} - {None}
    }
    assert knows == {"checkpoint"}, "ask lillama.checkpoint.names"


@pytest.mark.parametrize("code", ["x.lr_A", "f'{x}.lr_B'", "'lr_C'", "f(lr_W=1)", "lr_order = 2"])
def test_the_search_for_spellings_finds(code: str) -> None:
    assert any(spelling(node) for node in ast.walk(ast.parse(code)))


# Names and sizes
def test_kernels_is_a_folder_and_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels"
    assert not (ROOT / "tests" / "kernels").exists(), "it would shadow Hugging Face's kernels"
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_names_say_what_a_file_is_about() -> None:
    for path in EVERYTHING:
        words = set(path.relative_to(ROOT).with_suffix("").parts)
        words |= {word.removeprefix("test_").removeprefix("bench_") for word in words}
        assert not words & FORBIDDEN_NAMES, path


def long_functions(path: Path) -> Iterator[str]:
    """Those of 60 lines or more, the docstring not counted."""
    for node in nodes(path):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        first = node.body[0]
        if ast.get_docstring(node) is not None and first.end_lineno is not None:
            lines -= first.end_lineno - first.lineno + 1
        if lines >= MAX_FUNCTION_LINES:
            yield f"{name_of(path)}:{node.name}"


def test_functions_are_short() -> None:
    assert {name for path in EVERYTHING for name in long_functions(path)} == LONG


def sort_key(name: str) -> tuple[int, str]:
    """ruff's RUF022: constants, then classes, then the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def exported(path: Path) -> tuple[list[str], set[str]]:
    """`__all__` of a module, and the names that it has."""
    if "vllm" not in path.parts:  # an extra that is seldom installed: looked at, not imported
        module = importlib.import_module(module_of(path))
        return list(module.__all__), set(dir(module))
    names, found = [], set()
    for node in parse(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            if "__all__" in found and not names:
                names = ast.literal_eval(node.value)
    return names, found


def test_all_lists_names_that_exist() -> None:
    with_server = importlib.util.find_spec("fastapi") is not None
    for path in LIBRARY:
        if not path.read_text("utf-8").strip() or ("http" in path.parts and not with_server):
            continue
        names, found = exported(path)
        assert names == sorted(set(names), key=sort_key), path
        assert [name for name in names if name not in found] == [], path


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
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        return next((a.name for a in node.names if a.name in ("environ", "getenv", "putenv")), None)
    return None


def test_no_remote_code_no_pickle_no_environment() -> None:
    found = set()
    for path in LIBRARY:
        assert not {top(name) for name in imports_of(path)} & {
            *("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
        }, path
        found |= {(name_of(path), what) for node in nodes(path) if (what := forbidden(node))}
    # torchrun tells its workers who they are in no other way
    assert found == {("lillama/compress/session/processes.py", "os.environ")}


@pytest.mark.parametrize(
    "code",
    [
        "f(trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "os.environ['X']",
        "os.environ.get('X')",
        "os.getenv('X')",
        "from os import environ",
        "torch.load('x')",
    ],
)
def test_the_search_finds(code: str) -> None:
    assert any(forbidden(node) for node in ast.walk(ast.parse(code)))
