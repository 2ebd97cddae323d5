"""Files to token blocks: every file kind, every error, the same blocks everywhere."""

import copy
import dataclasses
import json
import logging
import os
import re
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lillama.data import documents
from lillama.data import sequences as data
from lillama.data.documents import Document, DocumentIndex
from lillama.data.sequences import (
    TokenBlocks,
    calibration_blocks,
    evaluation_blocks,
    read_documents,
)
from lillama.errors import InputError

END, START = "<end>", "<start>"
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def make_tokenizer(*, bos: bool = False, eos: bool = True, pad: bool = False) -> Any:
    """Byte-level BPE made by hand, not trained: END 0, START 1, 256 bytes, then "th" and "the"."""
    pieces = [END, START, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END if eos else None,
        pad_token=START if pad else None,
        model_max_length=8,
    )


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "_PIECE_BYTES", 64)


def numbered_lines(num_lines: int) -> str:
    return "".join(f"line {i} of the text\n" for i in range(num_lines))


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_rows(path: Path, *rows: object) -> Path:
    """A string is a row with that text."""
    rows = tuple({"text": row} if isinstance(row, str) else row for row in rows)
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def texts_of(path: Path, **options) -> list[str]:
    return [document.text or "" for document in read_documents(path, **options)]


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def whole(paths, tokenizer) -> list[int]:
    """All the ids in one list."""
    tail = evaluation_blocks(paths, tokenizer, seq_len=10**6).tail
    assert tail is not None
    return tail.flatten().tolist()


def calibrate(path, tokenizer, **options):
    options = {"tokens": 64, "seq_len": 16, "held_out_blocks": 2, **options}
    return calibration_blocks(path if isinstance(path, list) else [path], tokenizer, **options)


def padded_rows(blocks: TokenBlocks) -> list[list[int]]:
    """The real tokens of each block; checks that the padding is on the right."""
    assert blocks.mask is not None
    lengths = blocks.mask.sum(dim=1).tolist()
    for mask, length in zip(blocks.mask, lengths, strict=True):
        assert mask.tolist() == [True] * length + [False] * (mask.numel() - length)
    return [ids[:n].tolist() for ids, n in zip(blocks.input_ids, lengths, strict=True)]


def test_read_documents_plain_pieces_join_to_the_text(tmp_path, small_pieces):
    text = numbered_lines(50) + "\r\n\r\nlast line without an end"
    path = write(tmp_path / "a.txt", text)
    pieces = texts_of(path)
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert max(map(len, pieces)) <= 64
    assert all(document.is_piece for document in read_documents(path))


def test_read_documents_default_piece_size(tmp_path):
    sizes = [len(text) for text in texts_of(write(tmp_path / "a.txt", numbered_lines(10_000)))]
    assert len(sizes) == 4
    assert all(65_000 < size <= 65_536 for size in sizes[:-1])


@pytest.mark.parametrize("size", [5, 6, 7, 8, 9])
@pytest.mark.parametrize(
    "text",
    ["\u20ac\U0001f600\u00e9" * 20, "a\u20ac" * 20, "\u20ac \u20ac" * 9],
    ids=["three sizes", "two sizes", "with spaces"],
)
def test_read_documents_never_splits_a_character(tmp_path, monkeypatch, size, text):
    monkeypatch.setattr(documents, "_PIECE_BYTES", size)
    pieces = texts_of(write(tmp_path / "a.txt", text))
    assert "".join(pieces) == text
    assert len(pieces) >= len(text.encode()) // size


def test_read_documents_drops_a_byte_order_mark(tmp_path):
    assert texts_of(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == ["hello"]
    assert texts_of(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "hello"}')) == ["hello"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSON"])
def test_read_documents_rows_with_crlf_blank_lines_and_other_key(tmp_path, name):
    raw = b'{"body": "one\\r\\ntwo"}\r\n\r\n  \n{"body": "\xe2\x82\xac"}\n{"body": " "}'
    path = write(tmp_path / name, raw)
    assert texts_of(path, text_key="body") == ["one\r\ntwo", "\u20ac"]
    where = [document.where for document in read_documents(path, text_key="body")]
    assert where == [f"{path}:1", f"{path}:4"]


def test_read_documents_is_lazy(tmp_path):
    documents = read_documents(write(tmp_path / "a.jsonl", b'{"text": "good"}\nbad\n'))
    assert next(documents).text == "good"
    with pytest.raises(InputError, match=r"a\.jsonl:2 is not JSON"):
        next(documents)


def test_read_documents_sharegpt_and_messages(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    turns = [("system", "be kind"), ("human", "hi"), ("gpt", "yo")]
    sharegpt = {"conversations": [{"from": who, "value": value} for who, value in turns]}
    path = write_rows(tmp_path / "a.jsonl", {"messages": messages}, sharegpt)
    first, second = read_documents(path)
    assert first.messages == messages
    assert second.messages == [{"role": "system", "content": "be kind"}, *messages]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "a.txt is empty or only white space; give"),
        (b" \r\n\t\n", "a.txt is empty or only white space"),
        (b"good\nb\xff", "a.txt is not UTF-8: byte 0xff at offset 6; convert"),
        (b"x" * 70_000 + b"\xff", "byte 0xff at offset 70000"),
        (b"\x80" * 70_000, "byte 0x80 at offset 0"),
        (b"\xef\xbb\xbfab\xff", "byte 0xff at offset 5"),
        (b"cut \xe2\x82", "byte 0xe2 at offset 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_read_documents_rejects_plain_text(tmp_path, raw, message):
    with pytest.raises(InputError, match=re.escape(message)):
        texts_of(write(tmp_path / "a.txt", raw))


CHAT_LIST = "must be a list of objects, not empty; got"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\n\n", " is empty or only white space"),
        (b'{"text": ""}', " is empty or only white space"),
        (b'{"text": "a"}\n{"text": "\xe9"}', " is not UTF-8: byte 0xe9 at offset 24"),
        (b'{"text": "a"}\n\nnope\n', ":3 is not JSON (Expecting value: line 1 column 1 (char 0));"),
        (b'[\n{"text": "a"}\n]', ":1 is not JSON"),
        (b"[" * 200_000, ":1 is not JSON"),
        (b'["a"]', ":1 is a JSON list; give one JSON object per line"),
        (b'{"a": 1, "b": 2}', ":1 has no key 'text', its keys: 'a', 'b'; give 'text' with"),
        (b"{}", ":1 has no key 'text', its keys: none"),
        (b'{"text": 3}', ":1: 'text' must be a string, got int"),
        (b'{"text": null}', ":1: 'text' must be a string, got NoneType"),
        (b'{"text": "\\ud83d"}', ":1: 'text' holds half a surrogate pair"),
        (b'{"messages": []}', f":1: 'messages' {CHAT_LIST} '[]'"),
        (b'{"messages": "a"}', f":1: 'messages' {CHAT_LIST} 'a'"),
        (b'{"messages": ["a"]}', f":1: 'messages' {CHAT_LIST}"),
        (b'{"messages": [{"content": "a"}]}', "'messages': 'role' must be a string, got NoneType"),
        (b'{"messages": [{"role": "a", "content": []}]}', "'content' must be a string, got list"),
        (b'\n{"conversations": {}}', f":2: 'conversations' {CHAT_LIST}"),
        (b'{"conversations": [{"from": "tool", "value": ""}]}', "gpt or system, got 'tool'"),
        (b'{"conversations": [{"role": "user"}]}', ":1: 'conversations': 'from' must be a string"),
        (b'{"conversations": [{"from": "gpt"}]}', ":1: 'conversations': 'value' must be a string"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_read_documents_rejects_rows(tmp_path, raw, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        texts_of(write(tmp_path / "a.jsonl", raw))
    assert str(caught.value).count("a.jsonl") == 1
    assert "\n" not in str(caught.value)


def test_read_documents_rejects_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"nope\.txt: No such file.*check the path"):
        texts_of(tmp_path / "nope.txt")
    with pytest.raises(InputError, match="is a folder; give the files in it"):
        texts_of(tmp_path)


def test_evaluation_blocks_plain_text_in_order(tmp_path, tokenizer):
    text = "the caf\u00e9\r\n" + numbered_lines(9)
    paths = [write(tmp_path / "b.txt", text), write(tmp_path / "a.txt", "the end")]
    expected = ids_of(tokenizer, text) + ids_of(tokenizer, "the end")
    result = evaluation_blocks(paths, tokenizer, seq_len=16)
    num_full = len(expected) // 16
    assert result.input_ids.dtype == torch.int64
    assert result.input_ids.tolist() == [expected[16 * i : 16 * i + 16] for i in range(num_full)]
    assert result.tail is not None
    assert result.tail.tolist() == [expected[16 * num_full :]]
    assert result.num_tokens == len(expected)
    assert result.num_bytes == len((text + "the end").encode())


@pytest.mark.parametrize(
    ("length", "num_blocks", "tail"), [(4, 1, 0), (5, 1, 0), (6, 1, 2), (2, 0, 2)]
)
def test_evaluation_blocks_tail(tmp_path, tokenizer, length, num_blocks, tail):
    path = write(tmp_path / "a.txt", "x" * length)
    result = evaluation_blocks([path], tokenizer, seq_len=4)
    assert result.input_ids.shape == (num_blocks, 4)
    assert (0 if result.tail is None else result.tail.shape[1]) == tail
    assert result.num_tokens == length


def test_evaluation_blocks_pieces_keep_every_byte(tmp_path, tokenizer, small_pieces):
    text = numbered_lines(40) + "\u20ac" * 50
    path = write(tmp_path / "a.txt", text)
    assert tokenizer.decode(whole([path], tokenizer)) == text
    assert evaluation_blocks([path], tokenizer, seq_len=4).num_bytes == len(text.encode())


def test_evaluation_blocks_special_tokens(tmp_path, small_pieces):
    rows = write_rows(tmp_path / "a.jsonl", "ab", "cd")
    plain, other = write(tmp_path / "a.txt", "xy"), write(tmp_path / "b.txt", "z")
    long = write(tmp_path / "c.txt", numbered_lines(9))

    def text(paths, **options):
        tokenizer = make_tokenizer(**options)
        return tokenizer.decode(whole(paths, tokenizer))

    assert text([rows]) == f"ab{END}cd"
    assert text([rows], eos=False) == "abcd"
    assert text([plain, other, rows]) == f"xyz{END}ab{END}cd"
    assert text([rows], bos=True) == f"{START}ab{END}{START}cd"
    assert text([rows, plain], bos=True) == f"{START}ab{END}{START}cd{END}xy"
    assert text([long, plain], bos=True) == START + numbered_lines(9) + "xy"


def test_evaluation_blocks_rejects(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", "a")
    with pytest.raises(InputError, match="--seq-len must be at least 2, got 1"):
        evaluation_blocks([path], tokenizer, seq_len=1)
    with pytest.raises(InputError, match="the text has 1 tokens, needed are 2; add --text"):
        evaluation_blocks([path], tokenizer, seq_len=4)


@pytest.fixture
def chat(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    turns = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]
    return write_rows(tmp_path / "c.jsonl", {"messages": messages}, {"conversations": turns})


def test_chat_with_and_without_template(chat, tokenizer):
    assert tokenizer.decode(whole([chat], tokenizer)) == f"hi\n\nyo{END}why\n\nso"
    tokenizer.chat_template = TEMPLATE
    expected = f"[user]hi[assistant]yo{END}[user]why[assistant]so"
    assert tokenizer.decode(whole([chat], tokenizer)) == expected
    assert evaluation_blocks([chat], tokenizer, seq_len=4).num_bytes == len(expected) - len(END)


def test_chat_template_special_tokens_are_not_doubled(chat):
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = f"{START}{TEMPLATE}{END}"
    one, two = (f"{START}[user]{a}[assistant]{b}{END}" for a, b in (("hi", "yo"), ("why", "so")))
    assert tokenizer.decode(whole([chat], tokenizer)) == one + two
    options = {"tokens": 30, "seq_len": 64, "held_out_blocks": 0, "packing": False}
    train, _ = calibrate(chat, tokenizer, **options)
    assert {tokenizer.decode(row) for row in padded_rows(train)} == {one, two}


def test_chat_template_error_names_the_row(chat, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(InputError, match=r"c\.jsonl:1: the chat template refuses.*must alternate"):
        whole([chat], tokenizer)


def test_calibration_blocks_expected_digest(tmp_path, tokenizer, small_pieces):
    plain = write(tmp_path / "a.txt", numbered_lines(60))
    rows = write_rows(tmp_path / "b.jsonl", *(f"the row {i}" for i in range(20)))
    packed = calibrate([plain, rows], tokenizer, tokens=500, seed=3)
    padded = calibrate(rows, tokenizer, tokens=90, seed=3, packing=False)
    assert [blocks.sha256[:16] for blocks in (*packed, *padded)] == [
        "8725c27c3a8f5b19",
        "424b408975ef1b6f",
        "04e4d121eb081751",
        "c4daa559a342703a",
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_calibration_blocks_seed(tmp_path, tokenizer, small_pieces, packing):
    path = write(tmp_path / "a.txt", numbered_lines(60).replace("\n", "\n\n"))
    first, again, other = (
        [blocks.sha256 for blocks in calibrate(path, tokenizer, seed=seed, packing=packing)]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize("num_held_out", [0, 1, 3, 7])
def test_calibration_blocks_packed_held_out(tmp_path, tokenizer, num_held_out):
    # one piece, so nothing to shuffle: the blocks are the text's, in order
    text = "".join(f"{i:03d}" for i in range(300))
    stream = ids_of(tokenizer, text)
    blocks = [stream[i : i + 16] for i in range(0, len(stream), 16)]
    path = write(tmp_path / "a.txt", text)
    train, held_out = calibrate(path, tokenizer, tokens=305, held_out_blocks=num_held_out)
    num_blocks = 20 + num_held_out
    assert train.input_ids.dtype == held_out.input_ids.dtype == torch.int64
    assert train.mask is None
    assert held_out.mask is None
    assert (train.num_tokens, held_out.input_ids.shape) == (320, (num_held_out, 16))
    # every block is used once, and the gaps between held-out ones are even
    where = [blocks.index(row) for row in held_out.input_ids.tolist()]
    rest = [blocks.index(row) for row in train.input_ids.tolist()]
    assert sorted(where + rest) == list(range(num_blocks))
    edges = [-1, *where, num_blocks]
    gaps = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    assert max(gaps) <= num_blocks / max(num_held_out, 1) + 1


def test_calibration_blocks_samples_all_over_and_tokenises_little(
    tmp_path, tokenizer, monkeypatch, small_pieces
):
    seen, encode = [], data._encode
    monkeypatch.setattr(
        data, "_encode", lambda texts, *rest: seen.extend(texts) or encode(texts, *rest)
    )
    path = write(tmp_path / "a.txt", numbered_lines(2000))
    train, _ = calibrate(path, tokenizer, tokens=800)
    words = tokenizer.decode(train.input_ids.flatten()).split()
    numbers = [int(word) for word in words if word.isdigit()]
    assert min(numbers) < 400
    assert max(numbers) > 1600
    assert sum(map(len, seen)) < 2500


def test_calibration_blocks_packed_rows_begin_with_bos(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", *(f"abc{i}" for i in range(9)))
    tokenizer = make_tokenizer(bos=True)
    train, _ = calibrate(path, tokenizer, tokens=42, seq_len=6, held_out_blocks=1)
    # START a b c digit END: a row is as long as a block
    assert train.input_ids[:, 0].tolist() == [1] * 7
    assert train.input_ids[:, 5].tolist() == [0] * 7


def test_text_longer_than_the_context_does_not_warn(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", numbered_lines(60))
    messages = []
    handler = logging.Handler()
    handler.handle = lambda record: messages.append(record.getMessage()) is None
    tokenizer = copy.deepcopy(tokenizer)  # it warns once only
    getattr(tokenizer, "deprecation_warnings", {}).clear()
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.WARNING)  # the command line, tested in this process too, lowers it
    logger.addHandler(handler)
    try:
        calibrate(path, tokenizer)
        calibrate(path, tokenizer, packing=False, tokens=10, held_out_blocks=0)
        evaluation_blocks([path], tokenizer, seq_len=16)
        assert messages == []
        tokenizer(numbered_lines(60))
        assert "longer than the specified maximum" in messages[0]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize(("pad", "pad_id"), [(True, 1), (False, 0)], ids=["pad", "eos"])
def test_calibration_blocks_padded_rows_and_mask(tmp_path, pad, pad_id):
    tokenizer = make_tokenizer(pad=pad)
    texts = [f"{i:02d}" + "abc" * (i % 7) for i in range(40)]
    path = write_rows(tmp_path / "a.jsonl", *texts, "x", "y", "z")
    options = {"tokens": 120, "seq_len": 12, "held_out_blocks": 5, "packing": False}
    train, held_out = calibrate(path, tokenizer, **options)
    rows = padded_rows(train)
    decoded = [tokenizer.decode(row) for row in rows + padded_rows(held_out)]
    assert set(decoded) <= {text[:12] for text in texts}
    assert len(set(decoded)) == len(decoded)
    assert train.mask is not None
    assert (train.mask.dtype, train.input_ids.dtype) == (torch.bool, torch.int64)
    assert set(train.input_ids[~train.mask].tolist()) == {pad_id}
    assert held_out.input_ids.shape == (5, 12)
    # enough, and not one sample more
    assert train.num_tokens >= 120 > sum(map(len, rows[:-1]))


def test_calibration_blocks_padded_held_out_is_from_all_over(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", *(f"{i:03d}" for i in range(200)))
    options = {"tokens": 400, "seq_len": 4, "held_out_blocks": 20, "packing": False}
    train, held_out = (
        {int(tokenizer.decode(row)) for row in padded_rows(blocks)}
        for blocks in calibrate(path, tokenizer, **options)
    )
    assert (len(train), len(held_out), len(train | held_out)) == (134, 20, 154)
    assert min(held_out) < 50
    assert max(held_out) > 150


def test_calibration_blocks_padded_plain_text_by_paragraphs(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "_PIECE_BYTES", 8)
    # "x" is one token: no sample
    text = "\r\none\r\n  two\r\n\r\nthree and a long line\n \t\n\n\nfour\n\nx\n"
    options = {"tokens": 30, "seq_len": 40, "held_out_blocks": 0, "packing": False}
    train, held_out = calibrate(write(tmp_path / "a.txt", text), tokenizer, **options)
    decoded = {tokenizer.decode(row) for row in padded_rows(train)}
    assert decoded == {"one\r\n  two", "three and a long line", "four"}
    assert held_out.input_ids.shape == (0, 40)


def test_calibration_blocks_padded_adds_bos_and_needs_no_mask(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", *["abcdef"] * 9)
    for seq_len, has_mask in ((8, True), (7, False), (4, False)):
        tokenizer = make_tokenizer(bos=True)
        train, _ = calibrate(path, tokenizer, tokens=12, seq_len=seq_len, packing=False)
        assert (train.mask is not None) == has_mask
        assert train.input_ids[0, :4].tolist() == [1, *ids_of(tokenizer, "abc")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "--tokens must be at least 1, got 0"),
        ({"seq_len": 1}, "--seq-len must be at least 2, got 1"),
        ({"held_out_blocks": -1}, "held_out_blocks must be at least 0, got -1"),
        ({"tokens": 16}, "20 tokens, needed are 48 (3 blocks of 16, 2 of them held out); lower"),
        (
            {"tokens": 18, "packing": False},
            "18 tokens in 2 samples of at most 16, needed are 18 to",
        ),
    ],
)
def test_calibration_blocks_rejects(tmp_path, tokenizer, options, message):
    path = write(tmp_path / "a.txt", "123456789\n\n123456789")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        calibrate(path, tokenizer, **options)
    assert "\n" not in str(caught.value)


def test_calibration_blocks_exactly_enough(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", "x" * 96)
    assert [blocks.num_tokens for blocks in calibrate(path, tokenizer)] == [64, 32]
    with pytest.raises(InputError, match="too short: 96 tokens, needed are 112"):
        calibrate(path, tokenizer, tokens=65)


def test_calibration_blocks_rejects_bad_files(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", numbered_lines(60))
    with pytest.raises(InputError, match="is given twice.*give it once"):
        calibrate([path, str(tmp_path / "." / "a.txt")], tokenizer)
    with pytest.raises(InputError, match="check the path"):
        calibrate([path, tmp_path / "b.txt"], tokenizer)
    with pytest.raises(InputError, match="too short: 0 tokens"):
        calibrate([], tokenizer)


LINES = (
    "\ufeffone\r\ntwo \u00e9\u20ac\r\n\r\n  \nthree\rfour\n\n\u2028five "
    + "long " * 40
    + "\n\nsix\n"
)


def without_places(found: list[Document]) -> list[Document]:
    return [dataclasses.replace(document, place=None) for document in found]


@pytest.mark.parametrize("chars", [5, 10**6])
def test_index_reads_again_what_was_added(tmp_path, small_pieces, chars):
    plain, bare = write(tmp_path / "a.txt", LINES), write(tmp_path / "b.txt", LINES[1:])
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    rows = write_rows(tmp_path / "c.jsonl", "first\n\nrow", " ", chat, "\u00e9")
    write(rows, b"\xef\xbb\xbf" + rows.read_bytes().replace(b"\n", b"\r\n"))
    pieces = [document for path in (plain, bare, rows) for document in read_documents(path)]
    paragraphs = list(documents.samples(iter(pieces), chars))
    assert [document.text for document in paragraphs[-3:]] == ["first\n\nrow", None, "\u00e9"]
    held = without_places(pieces)
    for found in (pieces, paragraphs, held):
        index = DocumentIndex()
        for document in found:
            index.add(document)
        assert [index.read(i) for i in range(len(index))] == without_places(found)
    assert list(documents.samples(held, chars)) == without_places(paragraphs)


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    path, index = write_rows(tmp_path / "a.jsonl", "one", "two"), DocumentIndex()
    for document in read_documents(path):
        index.add(document)
    write_rows(path, "one")
    with pytest.raises(InputError, match="was changed while it was read; run again"):
        index.read(1)
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        index.read(0)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_calibration_blocks_hold_no_text(tmp_path, tokenizer, monkeypatch, suffix, packing):
    """Of 4 MB of text, from which 3,000 tokens are drawn all over."""
    monkeypatch.setattr(data, "_BATCH_SIZE", 1)
    paragraph = numbered_lines(100)
    path = tmp_path / f"a.{suffix}"
    if suffix == "txt":
        write(path, f"{paragraph}\n" * (4 * 2**20 // len(paragraph)))
    else:
        write_rows(path, *[paragraph] * (4 * 2**20 // len(paragraph)))
    tracemalloc.start()
    try:
        train, _ = calibrate(path, tokenizer, tokens=3000, packing=packing)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert train.num_tokens >= 3000
    assert peak < 2 * 2**20, f"{peak / 2**20:.1f} MiB"


@pytest.mark.parametrize("packing", [True, False])
def test_calibration_blocks_from_a_pipe_that_is_read_once(tmp_path, tokenizer, packing):
    text = numbered_lines(300).replace("\n", "\n\n")
    path, pipe = write(tmp_path / "a.txt", text), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()))
    writer.start()
    given = {"tokens": 100, "seq_len": 16, "held_out_blocks": 0, "packing": packing}
    found = calibrate(pipe, tokenizer, **given)
    writer.join()
    assert [b.sha256 for b in found] == [b.sha256 for b in calibrate(path, tokenizer, **given)]


def test_token_blocks_digest_covers_ids_mask_and_shape():
    ids, mask = torch.arange(6).view(2, 3), torch.tensor([[True] * 3, [True, True, False]])
    blocks = [TokenBlocks(ids), TokenBlocks(ids.view(3, 2)), TokenBlocks(ids + 1)]
    blocks += [TokenBlocks(ids, mask), TokenBlocks(ids, mask.flip(0))]
    assert len({b.sha256 for b in blocks}) == 5
    assert TokenBlocks(ids.t().contiguous().t()).sha256 == blocks[0].sha256
    assert [b.num_tokens for b in blocks] == [6, 6, 6, 5, 5]


def test_joined_blocks_keep_rows_and_masks():
    ids, mask = torch.arange(6).view(2, 3), torch.tensor([[True] * 3, [True, True, False]])
    whole, cut = TokenBlocks(ids), TokenBlocks(ids + 9, mask)
    assert whole.joined(whole).mask is None
    for first, second in ((whole, cut), (cut, whole), (cut, cut)):
        both = first.joined(second)
        assert both.input_ids.tolist() == first.input_ids.tolist() + second.input_ids.tolist()
        assert both.mask is not None and both.shape == (4, 3)
        assert both.num_tokens == first.num_tokens + second.num_tokens
        assert both.mask[2:].equal(mask) == (second is cut)
