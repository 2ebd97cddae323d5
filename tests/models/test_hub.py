"""Models by their name on the Hub: what is fetched, what is recorded, every error one line."""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lillama
from lillama.checkpoint.format import read_headers
from lillama.checkpoint.remote import fetch_weights, find_model
from lillama.cli import app as cli
from lillama.errors import InputError, LillamaError, RunError
from lillama.models.hub import hub_model, is_hub_id, model_name
from lillama.report.sections import command_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SURPLUS = ("pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "a.gguf")


class Hub:
    """In the place of huggingface_hub's functions: a folder is the remote, the cache is laid out as
    the real one. `asked` has (revision, names) of every download."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.cache = remote, cache
        self.asked: list[tuple[str | None, list[str]]] = []
        self.headers_asked = 0
        self.error: Exception | None = None

    @property
    def snapshot(self) -> Path:
        return self.cache / "models--org--name" / "snapshots" / COMMIT

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        dry_run: bool = False,
        local_files_only: bool = False,
    ) -> Any:
        if self.error is not None:
            raise self.error
        assert repo_id == "org/name"
        names = [
            name
            for file in sorted(self.remote.rglob("*"))
            if file.is_file()
            and any(fnmatch(name := str(file.relative_to(self.remote)), p) for p in allow_patterns)
        ]
        if dry_run:
            return [
                SimpleNamespace(file_size=(self.remote / name).stat().st_size, will_download=True)
                for name in names
            ]
        self.asked.append((revision, names))
        for name in names:
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.remote / name, self.snapshot / name)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        return str(self.snapshot)

    def get_safetensors_metadata(self, repo_id: str, *, revision: str) -> Any:
        assert (repo_id, revision) == ("org/name", COMMIT)
        self.headers_asked += 1
        files: dict[str, Any] = {}
        for name, header in read_headers(self.remote).items():
            tensor = SimpleNamespace(
                dtype=header.dtype, shape=list(header.shape), data_offsets=(8, 8 + header.num_bytes)
            )
            files.setdefault(header.file.name, SimpleNamespace(tensors={})).tensors[name] = tensor
        if not files:
            raise NotASafetensorsRepoError("no")
        return SimpleNamespace(files_metadata=files)


@pytest.fixture
def hub(tmp_path, monkeypatch, mamba) -> Hub:
    """A Hub with one model, org/name: the tiny Mamba, and what else repositories hold."""
    remote = tmp_path / "remote"
    shutil.copytree(mamba, remote)
    for name in SURPLUS:
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_bytes(b"not wanted")
    hub = Hub(remote, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", hub.get_safetensors_metadata)
    return hub


def http(kind: type[HfHubHTTPError], status: int = 404, text: str = "no\nmore") -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, status_code=status, request=None)
    return kind(text, response=response)


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("org/name", True),
        ("mistralai/Mixtral-8x7B-v0.1", True),
        ("name", False),
        ("./name", False),
        ("../name", False),
        ("~/name", False),
        ("/name", False),
        ("org/", False),
        ("a/b/c", False),
        ("a/b c", False),
        ("a/b--c", False),
        ("", False),
    ],
)
def test_is_hub_id(name, wanted):
    assert is_hub_id(name) == wanted


def test_find_model_fetches_what_is_needed_and_nothing_else(hub):
    path = find_model("org/name@v2")
    assert path == hub.snapshot
    assert files_in(path) == files_in(hub.remote) - set(SURPLUS)
    assert [revision for revision, _ in hub.asked] == ["v2", COMMIT]
    assert hub.asked[1][1] == ["model.safetensors"], "weights last, at the commit of the rest"
    found = hub_model(path)
    assert found is not None and (found.hub_id, found.commit) == ("org/name", COMMIT)
    assert model_name(path) == "org/name" and model_name(hub.remote) == "remote"
    fetch_weights(path)
    assert len(hub.asked) == 2, "they are there"


def test_find_model_fetches_the_shards_that_the_index_names(hub, mamba):
    (hub.remote / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(mamba)
    model.save_pretrained(hub.remote, max_shard_size="40KB")
    (hub.remote / "model-00099-of-00099.safetensors").write_bytes(b"left over")
    path = find_model("org/name")
    shards = sorted(name for name in files_in(path) if name.endswith(".safetensors"))
    assert len(shards) > 1 and "model-00099-of-00099.safetensors" not in shards
    assert read_headers(path).keys() == read_headers(mamba).keys()


def test_find_model_folder_wins(hub, tmp_path, monkeypatch, mamba):
    shutil.copytree(mamba, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert find_model("org/name") == Path("org/name")
    assert find_model(Path("org") / "name") == Path("org/name")
    assert lillama.generate("org/name", "the cat", max_new_tokens=1) is not None
    assert hub.asked == []


@pytest.mark.parametrize(
    ("error", "kind", "parts"),
    [
        (http(GatedRepoError, 403), InputError, ["org/name is gated", "`hf auth login`"]),
        (http(GatedRepoError, 403), InputError, ["https://huggingface.co/org/name", "HF_TOKEN"]),
        (http(RepositoryNotFoundError), InputError, ["neither a folder here nor a model of the"]),
        (http(RevisionNotFoundError), InputError, ["no branch, tag or commit 'v2'"]),
        (LocalEntryNotFoundError("no\nway"), RunError, ["the Hub cannot be reached", ": no"]),
        (http(HfHubHTTPError, 503, "busy"), RunError, ["answered 503", "busy; try again later"]),
        (http(HfHubHTTPError, 401), RunError, ["answered 401", "sign in"]),
        (OSError(errno.ENOSPC, "full"), RunError, ["the disk is full while", "HF_HOME"]),
        (RuntimeError("x: No space left on device"), RunError, ["the disk is full while"]),
        (ConnectionResetError("reset"), RunError, ["ConnectionResetError: reset; check the"]),
    ],
)
def test_find_model_error_is_one_line(error, kind, parts, hub):
    hub.error = error
    with pytest.raises(kind) as caught:
        find_model("org/name@v2")
    message = str(caught.value)
    assert "org/name" in message and "\n" not in message and "more" not in message.split("no ")
    assert all(part in message for part in parts), message


def test_find_model_without_config_is_refused(hub):
    (hub.remote / "config.json").unlink()
    with pytest.raises(InputError, match="org/name has no config.json at 0123456789ab.*GGUF"):
        find_model("org/name")


def test_find_model_without_safetensors_is_refused(hub):
    (hub.remote / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"org/name has no model.safetensors.*refs/pr/N"):
        find_model("org/name")


@pytest.mark.parametrize("what", ["quantized", "architecture"])
def test_find_model_refuses_before_the_weights_come(what, hub):
    config = json.loads((hub.remote / "config.json").read_text())
    change = {"quantization_config": {"quant_method": "awq"}}
    config |= change if what == "quantized" else {"model_type": "t5"}
    (hub.remote / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantized with 'awq'" if what == "quantized" else "'t5'"):
        find_model("org/name")
    assert len(hub.asked) == 1
    assert not list(hub.snapshot.glob("*.safetensors"))


def test_find_model_too_large_for_the_disk_is_refused(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"org/name needs 0\.\d GB more on the disk of .*HF_HOME"):
        find_model("org/name")
    assert not list(hub.snapshot.glob("*.safetensors"))


def test_find_model_goes_on_where_no_dry_run_can_be_made(hub, monkeypatch):
    """As when the network went away in between: the download itself says what is wrong."""

    def download(*args: Any, dry_run: bool = False, **options: Any) -> Any:
        if dry_run:
            raise DryRunError("offline")
        return hub.snapshot_download(*args, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert (find_model("org/name") / "model.safetensors").is_file()


# huggingface_hub itself, offline
def test_cached_model_is_used_offline(tmp_path, monkeypatch, mamba):
    folder = tmp_path / "models--org--name"
    snapshot = folder / "snapshots" / COMMIT
    shutil.copytree(mamba, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model("org/name") == find_model(f"org/name@{COMMIT}") == snapshot
    with pytest.raises(RunError, match="org/other is not a folder here, not .*in the cache"):
        find_model("org/other")
    with pytest.raises(RunError, match="org/name is not a folder here.*Hub cannot be reached"):
        find_model("org/name@other")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(RunError, match="not whole.*the Hub cannot be reached"):
        find_model("org/name")


# What the commands make of it
OPTIONS: dict[str, Any] = {"reduction": 0.2, "tokens": 300, "seq_len": 32, "train": False}


def test_compress_records_name_and_commit(hub, mamba, text_file, tmp_path, device):
    options = {**OPTIONS, "text": text_file, "device": str(device)}
    lillama.compress("org/name@v2", tmp_path / "out", **options)
    lillama.compress(mamba, tmp_path / "local", **options)
    out = tmp_path / "out"
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["options"]["model"], recipe["options"]["revision"]) == ("org/name", COMMIT)
    again = command_of(SimpleNamespace(recipe=recipe, out=out))
    assert again.startswith(f"lillama compress org/name {out} --revision {COMMIT} --reduction")
    local = json.loads((tmp_path / "local" / "recipe.json").read_text())
    assert local["options"]["model"] == str(mamba) and "revision" not in local["options"]
    assert recipe["model_sha256"] == local["model_sha256"]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["base_model"], config["base_revision"]) == ("org/name", COMMIT)
    card = (out / "README.md").read_text()
    assert huggingface_hub.ModelCard(card).data.to_dict()["base_model"] == "org/name"
    assert "# org/name, " in card
    for file in out.glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(tmp_path / "local" / file.name)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lillama.export(out, tmp_path / "dense")
    card = (tmp_path / "dense" / "README.md").read_text()
    assert huggingface_hub.ModelCard(card).data.to_dict()["base_model"] == "org/name"
    assert "org/name was compressed with lillama" in card


def test_compress_checks_its_options_before_the_weights_come(hub, tmp_path):
    with pytest.raises(InputError, match="--reduction must lie"):
        lillama.compress("org/name", tmp_path / "out", **{**OPTIONS, "reduction": 2.0}, text="t")
    assert not list(hub.snapshot.glob("*.safetensors"))


def test_compress_refuses_an_undeclared_family_before_the_weights_come(hub, tmp_path):
    """transformers has a causal model of this type, which only its blocks show to be unfit."""
    (hub.remote / "config.json").write_text(json.dumps({"model_type": "zamba2"}))
    with pytest.raises(InputError, match="'zamba2' cannot be compressed: its blocks share"):
        lillama.compress("org/name", tmp_path / "out", reduction=0.2, text=tmp_path / "text.txt")
    assert not list(hub.snapshot.glob("*.safetensors"))


def test_plan_fetches_headers_only(hub, mamba):
    found, wanted = (lillama.plan(model, 0.2, tokens=300) for model in ("org/name", mamba))
    for document in (found, wanted):
        document["peak_memory_bytes"].clear()  # holds what the process holds now
    assert found == wanted and found["matrices"]
    assert hub.headers_asked == 1 and not list(hub.snapshot.glob("*.safetensors"))
    find_model("org/name")
    lillama.plan("org/name", 0.2, tokens=300)
    assert hub.headers_asked == 1, "the weights are there by now"


@pytest.fixture
def command(monkeypatch, capfd) -> Any:
    """command("plan", ...) -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lillama", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capfd.readouterr()

    return run


COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "compress": lambda out, text: [out, "--reduction", 0.2, "--text", text],
    "plan": lambda out, text: ["--reduction", 0.2],
    "eval": lambda out, text: ["--text", text],
    "finetune": lambda out, text: [out, "--base", "org/base", "--text", text],
    "generate": lambda out, text: ["--prompt", "the"],
    "export": lambda out, text: [out],
    "serve": lambda out, text: [],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_cli_every_command_takes_a_name_and_a_revision(name, hub, command, tmp_path, text_file):
    if name == "serve":
        pytest.importorskip("fastapi", reason="needs lillama[serve]")
    hub.error = http(RevisionNotFoundError)
    options = COMMANDS[name](tmp_path / "out", text_file)
    code, out, err = command(name, "org/name", *options, "--revision", "v7")
    assert (code, out) == (2, "")
    assert err.startswith("lillama: error: org/name has no branch, tag or commit 'v7'; ")
    assert len(err.splitlines()) == 1
    code, _, err = command(name, "nowhere", *options, "--revision", "v7")
    assert code == 2 and "--revision v7 is for a model of the Hub (ORG/NAME), got MODEL no" in err


@pytest.mark.parametrize(("name", "option"), [("eval", "--against"), ("finetune", "--base")])
def test_cli_the_other_model_is_found_alike(name, option, hub, command, tmp_path, text_file, mamba):
    hub.error = http(RepositoryNotFoundError)
    options = {"--text": text_file, option: "org/base@main"}
    words = [word for pair in options.items() for word in pair]
    out = [tmp_path / "out"] if name == "finetune" else []
    code, _, err = command(name, mamba, *out, *words)
    assert code == 2 and "org/base is neither a folder here nor a model of the Hub" in err


def test_cli_name_that_is_neither(hub, command):
    code, _, err = command("generate", "nowhere", "--prompt", "the")
    assert code == 2 and hub.asked == []
    assert "nowhere is not a checkpoint folder; give the path of a local model, or the name" in err


def test_cli_generate_from_the_hub(hub, command, mamba, device):
    options = ["--prompt", "the cat", "--max-new-tokens", 4, "--device", device]
    found = command("generate", "org/name", *options)
    assert found == command("generate", mamba, *options) and found[0] == 0


def test_errors_are_ours(hub):
    hub.error = http(GatedRepoError)
    with pytest.raises(LillamaError):
        lillama.eval("org/name", "t.txt")
