"""The documentation does what it says: commands in it are run, or parsed at least; its lists are
whole.

A fenced `console` block is run: each line after `$ `, in order, in a folder of its own that shows
the repository's files. Lines of every other block that begin with one of our commands are parsed.
"""

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from lillama.cli import app as cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHECKED = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("[a-z]*/README.md"))]
# What pages may use of what the README's page made: small, its texts, events and quality
SEEN = ("README.md", "benchmarks", "docs", "examples", "kernels", "lillama")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def console_commands(path: Path) -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def run_lillama(arguments: list[str]) -> str:
    """The command in this process; returns its stdout."""
    out, old = io.StringIO(), sys.argv
    sys.argv = ["lillama", *arguments]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        sys.argv = old
    assert not caught.value.code, f"lillama {shlex.join(arguments)}"
    return out.getvalue()


def run_commands(commands: list[str], folder: Path) -> None:
    for command in commands:
        line, _, target = command.partition(" > ")
        words = shlex.split(line)
        with contextlib.chdir(folder):
            if words[0] == "lillama":
                out = run_lillama(words[1:])
                if target:
                    Path(target).write_text(out, "utf-8")
                continue
        if words[0] == "python":
            command = shlex.quote(sys.executable) + line.removeprefix("python")
        done = subprocess.run(["sh", "-ec", command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's page was run, from a model to a report."""
    folder = tmp_path_factory.mktemp("docs") / "repository"
    folder.mkdir()
    for name in SEEN:
        (folder / name).symlink_to(ROOT / name)
    run_commands(console_commands(ROOT / "README.md"), folder)
    return folder


def test_readme_page_makes_a_model_and_its_report(made: Path) -> None:
    report = json.loads((made / "small" / "report.json").read_text())
    assert 0.2 <= report["reduction"] < 0.21
    quality = json.loads((made / "quality.json").read_text())
    assert quality["params"] == report["params_after"] and 0.5 < quality["retained"] <= 1.01
    page = (made / "small" / "report.html").read_text("utf-8")
    assert f"{quality['perplexity']:.6g}" in page and f"{quality['retained']:.6g}" in page


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "README.md" and console_commands(p)], ids=name_of
)
def test_docs_commands_run(page: Path, made: Path, tmp_path: Path) -> None:
    commands = console_commands(page)
    known = set(console_commands(ROOT / "README.md"))
    # what the README's page did is done, with the same result; the rest is the page's own
    copy = shutil.copytree(made, tmp_path / "repository", symlinks=True)
    run_commands([command for command in commands if command not in known], copy)


# Commands that are not run


def joined_lines(path: Path) -> Iterator[str]:
    """Lines of code blocks, fenced or indented; those that end in a backslash with the next."""
    fenced, line = False, ""
    for raw in path.read_text("utf-8").splitlines():
        if raw.startswith("```"):
            fenced = not fenced
        elif fenced or raw.startswith("    "):
            line += raw.strip().removeprefix("$ ")
            if line.endswith("\\"):
                line = line.removesuffix("\\")
                continue
            yield line
            line = ""


def inline_code(path: Path) -> Iterator[str]:
    yield from re.findall(r"`([^`\n]+)`", path.read_text("utf-8"))


COMMANDS: dict[str, Any] = getattr(typer.main.get_command(cli.app), "commands")  # noqa: B009
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text("utf-8"), re.M))


def problem_of(line: str) -> str | None:
    """What is wrong with a command of ours; None where nothing is, or it is not one of ours."""
    if "-m lillama.cli.app " in line:
        line = "lillama " + line.partition("-m lillama.cli.app ")[2].rstrip("'")
    words = re.split(r"\s+", line.partition("#")[0].strip())
    if words[0] == "make" and len(words) > 1 and re.fullmatch("[a-z-]+", words[1]):
        return None if words[1] in TARGETS else f"no target {words[1]}"
    if words[:2] == ["python", "-m"] and words[2].startswith(("benchmarks.", "tests.")):
        there = (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
        return None if there else f"no module {words[2]}"
    if words[0] == "python" and len(words) > 1 and words[1].startswith("examples/"):
        return None if (ROOT / words[1]).is_file() else f"no file {words[1]}"
    if words[0] != "lillama" or len(words) < 2:
        return None
    words = [word for word in words[1:] if word not in ("--verbose", "--version")]
    if not words or words[0] in ("COMMAND", "--help"):
        return None
    if words[0] not in COMMANDS:
        return f"no command {words[0]}"
    known = {o for p in COMMANDS[words[0]].params for o in (*p.opts, *p.secondary_opts)}
    used = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
    return f"{words[0]} has no {sorted(used - known)}" if used - known else None


def test_docs_commands_exist_with_their_options() -> None:
    lines = [line for page in CHECKED for line in (*joined_lines(page), *inline_code(page))]
    assert sum(line.startswith("lillama ") for line in lines) > 50
    assert [f"{line}: {problem}" for line in lines if (problem := problem_of(line))] == []
    wrong = ("lillama compress M OUT --rank 3", "lillama shrink M", "make everything")
    assert all(map(problem_of, wrong))


def test_commands_page_has_every_command_and_option() -> None:
    text = (ROOT / "docs" / "commands.md").read_text("utf-8")
    text += (ROOT / "docs" / "serving.md").read_text("utf-8")
    for name, command in COMMANDS.items():
        assert f"\n## {name}\n" in text, name
        for parameter in command.params:
            long = [o for o in (*parameter.opts, *parameter.secondary_opts) if o.startswith("--")]
            assert not long or any(f"{o}`" in text or f"{o} " in text for o in long), (name, long)


# Pages and lists


def test_every_page_is_in_the_navigation_and_in_the_readme() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    assert set(re.findall(r": (\S+\.md)$", navigation, re.M)) == pages
    linked = re.findall(r"\]\(docs/([\w-]+\.md)\)", (ROOT / "README.md").read_text("utf-8"))
    assert set(linked) == pages


def anchors_of(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_anchors_and_named_files_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), (link, anchor)
    folders = "lillama|kernels|tests|benchmarks|examples|docs"
    files = re.findall(rf"`((?:{folders})/[\w./-]+\.(?:py|md|yml))`", text)
    assert [f for f in files if "my_op" not in f and not (ROOT / f).is_file()] == []


def test_code_of_the_pages_compiles() -> None:
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S):
            compile(block, name_of(page), "exec")


def test_messages_of_the_troubleshooting_page_are_in_the_code() -> None:
    """A part of each row that is long enough to know it by."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "lillama").rglob("*.py")]
    texts = [n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    said = "\n".join(text for text in texts if isinstance(text, str))
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    rows = re.findall(r"^\| `(.+?)` \|", page, re.M)
    assert len(rows) > 20
    assert [r for r in rows if not any(len(p) > 11 and p in said for p in r.split("..."))] == []
