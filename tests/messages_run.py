"""Messages about OUT, runs, servers and imports (see messages.py)."""

import errno
import importlib.util
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lillama
from lillama import checkpoint_writer, cli
from lillama.journal import locked
from lillama.serve.http import bind, serve
from tests.messages import Kit, case
from tests.test_upstream import LLAMA, write_blocks

# OUT


@case("... exists; choose another OUT or pass --overwrite")
def _(kit):
    kit.out.mkdir()
    kit.compress()


@case("... is not a model compressed by lillama; --overwrite does not replace it")
def _(kit):
    kit.out.mkdir()
    (kit.out / "mine.txt").touch()
    kit.compress(overwrite=True)


@case("the folder ... does not exist; create it first")
def _(kit):
    kit.compress(out=kit.folder / "no" / "out")


@case("OUT must lie outside MODEL, got ...")
def _(kit):
    kit.compress(out=kit.mamba / "out")


def unfinished(kit: Kit, claim: object) -> Path:
    staging = kit.folder / "out.unfinished"
    staging.mkdir()
    (staging / ".claim").write_text(json.dumps(claim))
    return staging


@case(
    "... is the unfinished run of another command ...; run that one again, delete the folder or "
    "choose another OUT"
)
def _(kit):
    unfinished(kit, {"command": "another"})
    kit.compress()


@case(
    "... of the unfinished run ...; the finished work cannot be trusted: delete ... to begin again"
)
def _(kit):
    original = checkpoint_writer.CheckpointWriter.finish
    kit.monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "finish", fail_on_disk)
    with pytest.raises(lillama.RunError):
        kit.compress()
    kit.monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "finish", original)
    next((kit.folder / "out.unfinished").glob("model-*")).write_bytes(b"other")
    kit.compress()


def fail_on_disk(*args: object, **options: object) -> None:
    raise lillama.RunError("stopped")


@case("another run ... is writing ...; wait for it or choose another OUT")
def _(kit):
    staging = unfinished(kit, {})
    with locked(staging, kit.out):
        kit.compress()


@case(
    "the disk of ... has ... GiB free, the ... needs ... GiB...; free space or choose another OUT"
)
def _(kit):
    usage = shutil.disk_usage("/")._replace(free=1000)
    kit.monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    kit.compress()


@case("the disk is full while writing ...; free space and run again...")
def _(kit):
    def full(*args: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kit.monkeypatch.setattr(checkpoint_writer, "write_shard", full)
    kit.compress()


# During the run


@case(
    "the output of ... holds NaN or infinity; the weights of this block or of one before it are "
    "broken"
)
def _(kit):
    name = "backbone.layers.1.mixer.out_proj.weight"
    kit.compress(kit.edited_weights(kit.mamba, lambda t: t[name].mul_(1e38)))


@case("the held-out loss of block ... became nan; lower the learning rate...")
def _(kit):
    distill = sys.modules["lillama.compress.distill"]
    original = distill.distill_loss
    kit.monkeypatch.setattr(
        distill, "distill_loss", lambda *a, **k: original(*a, **k) * float("nan")
    )
    kit.compress(train=True)


def command(kit: Kit, error: type[BaseException]) -> None:
    """`lillama plan` that ends in this way."""

    def fail(*args: object, **options: object) -> None:
        raise error

    kit.monkeypatch.setattr(sys.modules["lillama.compress.plan"], "plan", fail)
    kit.monkeypatch.setattr(sys, "argv", ["lillama", "plan", "MODEL", "--reduction", "0.2"])
    cli.main()


@case("out of memory; lower --seq-len or --tokens")
def _(kit):
    command(kit, torch.OutOfMemoryError)


@case("interrupted; ...")
def _(kit):
    command(kit, KeyboardInterrupt)


# Serving and reports


@case("serving needs packages that are not installed ...; pip install 'lillama[serve]'")
def _(kit):
    found = importlib.util.find_spec
    kit.monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name)
    )
    serve(kit.mamba)


@case("the report's plots need matplotlib, which is not installed: pip install 'lillama[report]'")
def _(kit):
    kit.monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lillama.report(kit.small)


@case("the engine does not serve model type ...; it serves ...: use vLLM")
def _(kit):
    serve(kit.make_checkpoint("gemma"), device="cpu", port=0)


@case("cannot listen on ... port ...: ...; choose another --port ...")
def _(kit):
    with socket.create_server(("127.0.0.1", 0)) as other:
        bind("127.0.0.1", other.getsockname()[1])


@case("... is about another model: it has ... parameters, OUT ...")
def _(kit):
    quality = {"perplexity": 9.0, "bits_per_byte": 1.0, "tokens": 10, "params": 11, "bytes": 44}
    lillama.report(kit.copy(kit.small), eval=kit.written("q.json", json.dumps(quality)))


# import-upstream


@case("... holds no rank_config.json and no config.json with ranks; give the folder that ...")
def _(kit):
    lillama.import_upstream(kit.folder, kit.out, base=kit.mamba)


def upstream(kit: Kit, damage: Callable[[Path], Any]) -> None:
    base = kit.make_checkpoint("llama", tie_word_embeddings=False)
    write_blocks(kit.folder / "upstream", base, LLAMA)
    damage(kit.folder / "upstream" / "checkpoints" / "model.layers.1.pt")
    lillama.import_upstream(kit.folder / "upstream", kit.out, base=base)


@case("... lacks ..., whose matrices rank_config.json names; ...")
def _(kit):
    upstream(kit, lambda file: file.unlink())


@case("... is damaged or needs pickle, which can run code and is not used: ...")
def _(kit):
    upstream(kit, lambda file: file.write_bytes(b"no archive"))


@case("upstream's tensors do not fit its ranks and --base ...; ...")
def _(kit):
    upstream(kit, lambda file: torch.save({"mlp.gate_proj.0.weight": torch.ones(1, 1)}, file))
