"""Messages about speech models and their clips (see messages.py)."""

import json

import numpy as np
from transformers import AutoTokenizer

import lillama
from tests.messages import Kit, case
from tests.tiny_whisper import save_whisper, write_wav


def compress(kit: Kit, seconds: float = 0.5, rate: int = 16_000, **options) -> None:
    """With nine rows of one clip."""
    model = save_whisper(kit.folder / "whisper", AutoTokenizer.from_pretrained(kit.mamba))
    write_wav(kit.folder / "a.wav", np.ones(int(seconds * rate)) / 2, rate)
    rows = [{"audio": "a.wav", "text": "the cat"}] * 9
    kit.written("m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    kit.compress(model, **{"text": kit.folder / "m.jsonl", "tokens": None, **options})


def row(kit: Kit, **values: str) -> None:
    compress(kit, text=kit.written("row.jsonl", (json.dumps(values) + "\n") * 9))


@case("audio file ...: No such file or directory; check the path")
def _(kit):
    row(kit, audio="b.wav", text="the cat")


@case("audio file ... is no PCM wav file (...); convert it: ffmpeg ...")
def _(kit):
    row(kit, audio=str(kit.written("b.wav", "fLaC")), text="the cat")


@case("audio file ... has ... samples a second, the model hears ...; convert it: ffmpeg ...")
def _(kit):
    compress(kit, rate=8000)


@case("...: ... lasts ... s, the model hears ... s; cut it, and its transcript")
def _(kit):
    compress(kit, seconds=1.5)


@case(
    "... has no key 'audio', its keys: ...; a speech model is calibrated on rows with 'audio', ..."
)
def _(kit):
    row(kit, text="the cat")


@case("... is not JSON (...); a speech model wants lines as ...")
def _(kit):
    compress(kit, text=kit.text)


@case(
    "the manifests have ... clips, needed are ... to train and ... held out (...); lower --tokens "
    "or add clips"
)
def _(kit):
    compress(kit, tokens=100)


@case("a speech model cannot write its own calibration data; give --text MANIFEST.jsonl ...")
def _(kit):
    compress(kit, text=())


@case("preset best trains the whole model on text, of a speech model ...; use preset default")
def _(kit):
    compress(kit, preset="best", train=True)


@case(
    "... is a speech model (model_type ...), which lillama only compresses and exports; run it "
    "with ..."
)
def _(kit):
    model = save_whisper(kit.folder / "whisper", AutoTokenizer.from_pretrained(kit.mamba))
    lillama.generate(model, "the cat")
