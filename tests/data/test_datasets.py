"""Calibration text from datasets of the Hub: what --text may say, which rows are read, and what a
recipe keeps. `datasets` is a fake, or the real one on local files where it is installed."""

import importlib.metadata
import importlib.util
import json
import logging
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file

import lillama
from lillama.config import FinetuneConfig
from lillama.data import datasets as hub_text
from lillama.data.datasets import TEXT_PRESETS, HubText, find_texts
from lillama.data.sequences import calibration_blocks, evaluation_blocks
from lillama.errors import InputError, RunError
from lillama.models.hub import recorded
from tests.fake_datasets import COMMIT, MOVED, Datasets

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


@pytest.fixture
def datasets(monkeypatch) -> Datasets:
    fake = Datasets([{"text": f"the cat number {i} sat on a mat"} for i in range(400)])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(huggingface_hub, "dataset_info", fake.dataset_info)
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9.9" if name == "datasets" else version(name)
    )
    return fake


def blocks_of(text: Any, tokenizer: Any, **options: Any) -> list[str]:
    values = {"tokens": 200, "seq_len": 16, "held_out_blocks": 3, "seed": 0, **options}
    texts = text if isinstance(text, tuple) else find_texts(text)
    return [part.sha256 for part in calibration_blocks(texts, tokenizer, **values)]


def documents_of(text: str, **options: Any) -> list[str | list[dict] | None]:
    (found,) = find_texts(text)
    assert isinstance(found, HubText)
    return [document.text or document.messages for document in found.documents(**options)]


# What --text says
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("hf:org/name", {"dataset": "org/name"}),
        ("hf:name", {"dataset": "name"}),
        ("hf:org/name:en", {"config": "en"}),
        ("hf:org/name:en:test", {"config": "en", "split": "test"}),
        ("hf:org/name::test", {"split": "test"}),
        ("hf:org/name#body", {"field": "body"}),
        ("hf:org/name@refs/pr/3:en:test#a b", {"config": "en", "split": "test", "field": "a b"}),
        (f"hf:org/name@{MOVED}", {"revision": MOVED}),
    ],
)
def test_find_texts_forms(text, wanted, datasets):
    (found,) = find_texts(text)
    assert isinstance(found, HubText)
    values = {"dataset": "org/name", "split": "train", "revision": COMMIT, **wanted}
    if "dataset" in wanted:
        values["dataset"] = wanted["dataset"]
    assert found == HubText(**values)
    assert find_texts(str(found)) == (found,), "what a recipe says can be given again"


@pytest.mark.parametrize("text", ["hf:", "hf:a/b/c", "hf:a b", "hf:a/b:c:d:e", "hf:a/b#", "hf:@x"])
def test_find_texts_refuses_other_forms(text, datasets):
    with pytest.raises(InputError, match=r"is not of the form hf:NAME\[@REVISION\]"):
        find_texts(text)


def test_presets_are_these_datasets(datasets):
    """A change here changes what everybody's --text means."""
    found = {name: str(HubText(**{**fields(text), "preset": None})) for name, text in PRESETS}
    assert found == {
        "wikitext2": "hf:Salesforce/wikitext:wikitext-2-raw-v1:train#text",
        "c4": "hf:allenai/c4:en:train#text",
        "slimorca": "hf:Open-Orca/SlimOrca::train#conversations",
        "ultrachat": "hf:HuggingFaceH4/ultrachat_200k::train_sft#messages",
    }
    assert [name for name, text in PRESETS if text.is_running] == ["wikitext2"]
    for name, text in PRESETS:
        assert text.preset == name
        (pinned,) = find_texts(f"{name}@{MOVED}")
        assert str(pinned) == f"{name}@{MOVED}" and find_texts(str(pinned)) == (pinned,)
        (newest,) = find_texts(name)
        assert str(newest) == f"{name}@{COMMIT}"


PRESETS = list(TEXT_PRESETS.items())


def fields(text: HubText) -> dict[str, Any]:
    return {name: getattr(text, name) for name in HubText.__slots__}


def test_presets_are_in_the_docs():
    rows = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8").splitlines()
    for name, text in PRESETS:
        row = next(row for row in rows if row.startswith(f"| `{name}` |"))
        assert f"{text.dataset}" in row and f"`{text.split}`" in row and f"`{text.field}`" in row
        assert text.config is None or f"`{text.config}`" in row
        assert (f"`{text.eval_split}`" if text.eval_split else "none") in row


def test_file_of_a_preset_name_wins(tmp_path, monkeypatch, datasets):
    monkeypatch.chdir(tmp_path)
    Path("c4").write_text("the cat")
    Path("hf:x").write_text("the cat")
    assert find_texts(["c4", "hf:x", "none.txt"]) == (Path("c4"), Path("hf:x"), Path("none.txt"))


def test_repository_errors_are_one_line(datasets, monkeypatch):
    for kind, message in (
        (RepositoryNotFoundError, "org/name is neither a file here nor a dataset of the Hub"),
        (GatedRepoError, "org/name is gated.*huggingface.co/datasets/org/name.*hf auth login"),
    ):
        response: Any = SimpleNamespace(headers={}, status_code=404, request=None)

        def info(name: str, *, revision: str | None, kind=kind, response=response) -> Any:
            raise kind("no", response=response)

        monkeypatch.setattr(huggingface_hub, "dataset_info", info)
        with pytest.raises(InputError, match=message):
            find_texts("hf:org/name")


# Which rows
@pytest.mark.parametrize("packing", [True, False])
def test_blocks_are_fixed_by_commit_and_seed(packing, tokenizer, datasets):
    first, again, other = (
        blocks_of("hf:org/name", tokenizer, seed=seed, packing=packing) for seed in (3, 3, 4)
    )
    assert first == again and not set(first) & set(other)
    assert datasets.opened[0] == ("org/name", None, "train", COMMIT)
    assert datasets.shuffled == [(seed, hub_text.SHUFFLE_BUFFER) for seed in (3, 3, 4)]


def test_stream_is_read_only_as_far_as_needed(tokenizer, datasets):
    length = len(tokenizer("the cat number 123 sat on a mat")["input_ids"])
    blocks_of("hf:org/name", tokenizer)
    needed = (200 + 4 * 16) // length + 1
    assert needed <= datasets.read <= needed + 17, "a batch of the tokenizer more"
    datasets.read = 0
    blocks_of("hf:org/name", tokenizer, tokens=400, packing=False)
    assert datasets.read < 80


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100])
def test_what_is_read_is_always_enough(tokens, packing, tokenizer, datasets):
    """The estimate may not be short, whatever the rows' lengths."""
    datasets.rows = [{"text": "the cat sat " * (1 + i * 7 % 19)} for i in range(300)]
    options = {"tokens": tokens, "held_out_blocks": 5, "packing": packing}
    assert len(blocks_of("hf:org/name", tokenizer, **options)) == 2


def test_dataset_that_is_too_short_is_refused(tokenizer, datasets):
    datasets.rows = datasets.rows[:5]
    with pytest.raises(InputError, match="the text is too short"):
        blocks_of("hf:org/name", tokenizer)


def test_files_and_datasets_are_mixed(tokenizer, datasets, text_file):
    mixed = blocks_of((text_file, *find_texts("hf:org/name")), tokenizer)
    assert mixed not in (blocks_of((text_file,), tokenizer), blocks_of("hf:org/name", tokenizer))
    with pytest.raises(InputError, match="is given twice"):
        blocks_of(find_texts(["hf:org/name", f"hf:org/name@{COMMIT}"]), tokenizer)


def test_rows_without_text_are_left_out(datasets):
    datasets.rows = [{"text": text} for text in ("one", "", None, "  \n", "two")]
    assert documents_of("hf:org/name") == ["one", "two"]
    datasets.rows = [{"text": ""}]
    with pytest.raises(InputError, match="has no row with text; name another #FIELD"):
        documents_of("hf:org/name")


def test_rows_may_be_chats(tokenizer, datasets):
    turns = [("system", "be kind"), ("human", "hi"), ("gpt", "yo")]
    sharegpt = [{"from": who, "value": value, "weight": 1.0} for who, value in turns]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    kind = {"role": "system", "content": "be kind"}
    datasets.rows = [{"messages": messages, "prompt": "hi"}, {"messages": []}]
    assert documents_of("hf:org/name") == documents_of("ultrachat") == [messages]
    datasets.rows = [{"conversations": sharegpt}]
    assert documents_of("slimorca") == [[kind, *messages]]
    datasets.rows = [{"chosen": messages}, {"chosen": sharegpt}, {"chosen": "plain"}]
    assert documents_of("hf:org/name#chosen") == [messages, [kind, *messages], "plain"]


def test_running_text_is_joined_and_shuffled_in_pieces(datasets, monkeypatch):
    monkeypatch.setattr(hub_text, "_PIECE_CHARS", 20)
    datasets.rows = [
        {"text": t} for t in ("", " = A = \n", "", " one two three \n", " four \n", "")
    ]
    whole = "\n = A = \n\n one two three \n four \n\n"
    pieces = documents_of("wikitext2")
    assert len(pieces) > 1 and "".join(map(str, pieces)) == whole
    assert sorted(map(str, documents_of("wikitext2", seed=1))) == sorted(map(str, pieces))
    datasets.rows = [{"text": f"line {i} of the text\n"} for i in range(50)]
    assert documents_of("wikitext2", seed=1) != documents_of("wikitext2", seed=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "hf:org/name::nope",
            "cannot be opened: Bad split: nope. Available .*give hf:NAME",
        ),
        ("hf:org/name#body", "a row has no 'body', its fields: 'text'; name one at the end"),
    ],
)
def test_what_the_dataset_does_not_have_is_said(text, message, datasets):
    with pytest.raises(InputError, match=message) as caught:
        documents_of(text)
    assert "\n" not in str(caught.value)


def test_row_that_cannot_be_used_is_named(datasets):
    datasets.rows = [{"text": "a"}, {"text": 3}]
    with pytest.raises(InputError, match=rf"hf:org/name@{COMMIT}::train, row 2: 'text' must be a"):
        documents_of("hf:org/name")


def test_network_that_dies_is_one_line(datasets):
    datasets.dies_at = 5
    with pytest.raises(RunError, match="cannot read org/name from the Hub: TimeoutError: read tim"):
        documents_of("hf:org/name")


def test_without_the_extra_it_says_what_to_install(datasets, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'lillama\[data\]'"):
        documents_of("c4")


# Chat templates
def test_chat_goes_through_the_template(tokenizer, datasets, monkeypatch, caplog):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    datasets.rows = [{"messages": messages}] * 60
    train, _ = calibration_blocks(
        find_texts("hf:org/name"), tokenizer, tokens=64, seq_len=16, held_out_blocks=1
    )
    assert "hi\n\nyo" in tokenizer.decode(train.input_ids.flatten())
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "row 1 is a chat, but the tokenizer has no chat" in warnings[0]
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    train, _ = calibration_blocks(
        find_texts("hf:org/name"), tokenizer, tokens=64, seq_len=16, held_out_blocks=1
    )
    assert "[user]hi[assistant]yo" in tokenizer.decode(train.input_ids.flatten())
    assert len(caplog.records) == 1


def test_local_chat_without_a_template_warns_once(tmp_path, tokenizer, caplog):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hi there"}]}) + "\n")
    caplog.set_level(logging.WARNING)
    evaluation_blocks([file], tokenizer, seq_len=8)
    assert [f"{file}:1 is a chat" in record.getMessage() for record in caplog.records] == [True]


# A run
OPTIONS: dict[str, Any] = {"reduction": 0.2, "tokens": 400, "seq_len": 32}


def weights(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


def stop(stage: str, done: int, total: int) -> None:
    if stage == "block 1 train":
        signal.raise_signal(signal.SIGINT)


def test_compress_records_the_dataset_and_resumes_to_the_same_bits(datasets, mamba, tmp_path):
    options = {**OPTIONS, "checkpoint_seconds": 0.0, "preset": "whitened", "device": "cpu"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    lillama.compress(mamba, whole, text="c4", **options)
    recipe = json.loads((whole / "recipe.json").read_text())
    assert recipe["options"]["text"] == [f"c4@{COMMIT}"]
    assert recipe["datasets"] == [
        {
            "text": f"c4@{COMMIT}",
            "id": "allenai/c4",
            "revision": COMMIT,
            "config": "en",
            "split": "train",
            "field": "text",
            "shuffle_buffer": hub_text.SHUFFLE_BUFFER,
        }
    ]
    assert recipe["datasets_version"] == "9.9" and len(recipe["data_sha256"]["train"]) == 64

    with pytest.raises(RunError):
        lillama.compress(mamba, out, text="c4", progress=stop, **options)
    # rows that changed although the commit did not: the blocks' hash tells
    rows = datasets.rows
    datasets.rows = [{"text": row["text"].replace("cat", "dog")} for row in rows]
    with pytest.raises(InputError, match="unfinished run of another command.*data_sha256"):
        lillama.compress(mamba, out, text="c4", **options)
    datasets.rows = rows
    # the branch moved: the commit of the unfinished run can still be named
    datasets.commit = MOVED
    with pytest.raises(InputError, match=rf"unfinished run of another command.*c4@{COMMIT}"):
        lillama.compress(mamba, out, text="c4", **options)
    lillama.compress(mamba, out, text=f"c4@{COMMIT}", **options)
    assert weights(out) == weights(whole)
    assert load_file(next(out.glob("*.safetensors")))


def test_eval_reads_the_split_for_measuring_in_order(datasets, mamba, tmp_path, device):
    datasets.rows = [{"text": f"the cat number {i} sat on a mat \n"} for i in range(40)]
    found = lillama.eval(mamba, "wikitext2", seq_len=32, device=str(device))
    assert datasets.opened == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test", COMMIT)]
    assert datasets.shuffled == []
    (tmp_path / "t.txt").write_text("".join(row["text"] for row in datasets.rows))
    assert found == lillama.eval(mamba, tmp_path / "t.txt", seq_len=32, device=str(device))
    with pytest.raises(InputError, match="--text c4 is for calibration: all of it would be read"):
        lillama.eval(mamba, "c4", device=str(device))


def test_finetune_records_models_and_texts_with_their_commits(datasets):
    snapshot = Path("hub") / "models--org--base" / "snapshots" / COMMIT
    config = FinetuneConfig(
        model=Path("m"), out=Path("o"), base=snapshot, text=find_texts(["ultrachat", "a.txt"])
    )
    found = recorded(config)
    assert (found["base"], found["base_revision"]) == ("org/base", COMMIT)
    assert found["model"] == "m" and "revision" not in found
    assert found["text"] == [f"ultrachat@{COMMIT}", "a.txt"]
    json.dumps(found)


# The real package
@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs lillama[data]")
def test_real_datasets_on_local_files(tmp_path, tokenizer, monkeypatch):
    import datasets  # pyright: ignore[reportMissingImports]

    for part in range(3):
        rows = [{"text": f"the cat number {part} {i} sat on a mat"} for i in range(200)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"train-{part}.jsonl").write_text(lines)
    shutil.copy(tmp_path / "train-0.jsonl", tmp_path / "test-0.jsonl")
    load = datasets.load_dataset

    def local(path: str, *args: Any, revision: str, **options: Any) -> Any:
        return load(str(tmp_path), *args, **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    text = f"hf:org/name@{COMMIT}"
    assert blocks_of(text, tokenizer, seed=1) == blocks_of(text, tokenizer, seed=1)
    assert blocks_of(text, tokenizer, seed=1) != blocks_of(text, tokenizer, seed=2)
    assert len(documents_of(f"{text}::test")) == 200
    with pytest.raises(InputError, match="Bad split: nope. Available splits"):
        documents_of(f"{text}::nope")
    with pytest.raises(InputError, match="BuilderConfig 'xx' not found. Available"):
        documents_of(f"{text}:xx")
