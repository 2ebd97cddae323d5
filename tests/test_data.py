"""Files to token blocks: every file kind, every error, the same blocks everywhere."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lillama import data
from lillama.data import calibration_blocks, evaluation_blocks, read_documents
from lillama.errors import InputError

END, START = "<end>", "<start>"
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def make_tokenizer(*, bos: bool = False, eos: bool = True, pad: bool = False):
    """Byte-level BPE made by hand, not trained: END 0, START 1, 256 bytes, then "th" and "the"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [END, START, *alphabet, "th", "the"]
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


def numbered_lines(num_lines: int) -> str:
    return "".join(f"line {i} of the text\n" for i in range(num_lines))


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_rows(path: Path, *rows: object) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def whole(paths, tokenizer, **options) -> list[int]:
    """All the ids of evaluation_blocks in one list."""
    result = evaluation_blocks(paths, tokenizer, seq_len=2, **options)
    tail = [] if result.tail is None else result.tail.flatten().tolist()
    return result.input_ids.flatten().tolist() + tail


def calibrate(paths, tokenizer, **options):
    defaults = {"tokens": 64, "seq_len": 16, "held_out_blocks": 2}
    return calibration_blocks(paths, tokenizer, **{**defaults, **options})


# Reading


def test_read_documents_plain_pieces_join_to_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_PIECE_BYTES", 64)
    text = numbered_lines(50) + "\r\n\r\nlast line without an end"
    pieces = list(read_documents(write(tmp_path / "a.txt", text)))
    assert "".join(piece.text or "" for piece in pieces) == text
    assert len(pieces) > 10
    assert all(piece.is_piece and piece.where.endswith("a.txt") for piece in pieces)
    assert all((piece.text or "").endswith("\n") for piece in pieces[:-1])
    assert max(len(piece.text or "") for piece in pieces) <= 64


def test_read_documents_default_piece_size(tmp_path):
    pieces = list(read_documents(write(tmp_path / "a.txt", numbered_lines(10_000))))
    sizes = [len(piece.text or "") for piece in pieces]
    assert all(65_000 < size <= 65_536 for size in sizes[:-1])
    assert len(sizes) == 4


@pytest.mark.parametrize("size", [5, 6, 7, 8, 9])
@pytest.mark.parametrize(
    "text", ["\u20ac\U0001f600\u00e9" * 20, "a\u20ac" * 20, "\u20ac \u20ac" * 9]
)
def test_read_documents_never_splits_a_character(tmp_path, monkeypatch, size, text):
    monkeypatch.setattr(data, "_PIECE_BYTES", size)
    pieces = list(read_documents(write(tmp_path / "a.txt", text)))
    assert "".join(piece.text or "" for piece in pieces) == text
    assert len(pieces) >= len(text.encode()) // size


def test_read_documents_drops_a_byte_order_mark(tmp_path):
    plain = write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")
    rows = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "hello"}')
    assert [d.text for path in (plain, rows) for d in read_documents(path)] == ["hello", "hello"]


def test_read_documents_rows_with_crlf_blank_lines_and_other_key(tmp_path):
    raw = b'{"body": "one\\r\\ntwo"}\r\n\r\n  \n{"body": "\xe2\x82\xac"}\n{"body": " "}'
    for name in ("a.jsonl", "a.JSON"):
        documents = list(read_documents(write(tmp_path / name, raw), text_key="body"))
        assert [d.text for d in documents] == ["one\r\ntwo", "\u20ac"]
        assert [d.where.rsplit(":")[-1] for d in documents] == ["1", "4"]
        assert not any(d.is_piece for d in documents)


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
    ("name", "raw", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty or only white space; give"),
        ("a.txt", b" \r\n\t\n", r"a\.txt is empty or only white space"),
        ("a.jsonl", b"\n\n", r"a\.jsonl is empty or only white space"),
        ("a.jsonl", b'{"text": ""}', r"a\.jsonl is empty or only white space"),
        ("a.txt", b"good\nb\xff", r"a\.txt is not UTF-8: byte 0xff at offset 6; convert"),
        ("a.txt", b"x" * 70_000 + b"\xff", r"byte 0xff at offset 70000"),
        ("a.txt", b"\x80" * 70_000, r"byte 0x80 at offset 0"),
        ("a.txt", b"\xef\xbb\xbfab\xff", r"byte 0xff at offset 5"),
        ("a.txt", b"cut \xe2\x82", r"byte 0xe2 at offset 4"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"byte 0xe9 at offset 24"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\nnope\n',
            r"a\.jsonl:3 is not JSON .*one JSON object per line",
        ),
        ("a.json", b'[\n{"text": "a"}\n]', r"a\.json:1 is not JSON"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b'["a"]', r"a\.jsonl:1 is a JSON list; give one JSON object"),
        ("a.jsonl", b'{"a": 1, "b": 2}', r"a\.jsonl:1 has no key 'text', its keys: 'a', 'b'; give"),
        ("a.jsonl", b"{}", r"a\.jsonl:1 has no key 'text', its keys: none"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: 'text' must be a string, got int"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl:1: 'text' must be a string, got NoneType"),
        ("a.jsonl", b'{"text": "\\ud83d"}', r"a\.jsonl:1: 'text' holds half a surrogate pair"),
        ("a.jsonl", b'{"messages": []}', r":1: 'messages' must be a list of objects, not empty"),
        ("a.jsonl", b'{"messages": "a"}', r"'messages' must be a list of objects.* got 'a'"),
        ("a.jsonl", b'{"messages": ["a"]}', r"'messages' must be a list of objects"),
        ("a.jsonl", b'{"messages": [{"content": "a"}]}', r"'messages': 'role' must be a string"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [1]}]}',
            r"a\.jsonl:1: 'messages': 'content' must be a string, got list",
        ),
        (
            "a.jsonl",
            b'\n{"conversations": [{"from": "tool", "value": "a"}]}',
            r"a\.jsonl:2: 'conversations': 'from' must be human, gpt or system, got 'tool'",
        ),
        (
            "a.jsonl",
            b'{"conversations": [{"role": "user", "content": "a"}]}',
            r"a\.jsonl:1: 'conversations': 'from' must be a string, got NoneType",
        ),
        (
            "a.jsonl",
            b'{"conversations": [{"from": "gpt"}]}',
            r"a\.jsonl:1: 'conversations': 'value' must be a string, got NoneType",
        ),
    ],
)
def test_read_documents_rejects_in_one_line(tmp_path, name, raw, message):
    path = write(tmp_path / name, raw)
    with pytest.raises(InputError, match=message) as caught:
        list(read_documents(path))
    assert "\n" not in str(caught.value)


def test_read_documents_rejects_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"nope\.txt: No such file.*check the path"):
        list(read_documents(tmp_path / "nope.txt"))
    with pytest.raises(InputError, match=r"is a folder; give the files in it"):
        list(read_documents(tmp_path))


# Evaluation text


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
    assert tokenizer.decode(expected) == text + "the end"


@pytest.mark.parametrize(
    ("text", "num_blocks", "tail"),
    [("abcd", 1, 0), ("abcde", 1, 0), ("abcdef", 1, 2), ("ab", 0, 2)],
)
def test_evaluation_blocks_tail(tmp_path, tokenizer, text, num_blocks, tail):
    result = evaluation_blocks([write(tmp_path / "a.txt", text)], tokenizer, seq_len=4)
    assert result.input_ids.shape == (num_blocks, 4)
    assert (0 if result.tail is None else result.tail.shape[1]) == tail
    assert result.num_tokens == len(text)


def test_evaluation_blocks_pieces_keep_every_byte(tmp_path, tokenizer, monkeypatch):
    text = numbered_lines(40) + "\u20ac" * 50
    path = write(tmp_path / "a.txt", text)
    monkeypatch.setattr(data, "_PIECE_BYTES", 50)
    assert tokenizer.decode(whole([path], tokenizer)) == text
    assert evaluation_blocks([path], tokenizer, seq_len=4).num_bytes == len(text.encode())


def test_evaluation_blocks_rows_are_separated(tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", {"text": "ab"}, {"text": "cd"})
    plain = write(tmp_path / "a.txt", "xy")
    other = write(tmp_path / "b.txt", "z")

    def text(paths, **options):
        tokenizer = make_tokenizer(**options)
        return tokenizer.decode(whole(paths, tokenizer))

    assert text([rows]) == f"ab{END}cd"
    assert text([rows], eos=False) == "abcd"
    assert text([plain, other, rows]) == f"xyz{END}ab{END}cd"
    assert text([rows], bos=True) == f"{START}ab{END}{START}cd"
    assert text([plain, other], bos=True) == f"{START}xyz"
    assert text([rows, plain], bos=True) == f"{START}ab{END}{START}cd{END}xy"


def test_evaluation_blocks_plain_pieces_have_one_bos(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_PIECE_BYTES", 16)
    tokenizer = make_tokenizer(bos=True)
    ids = whole([write(tmp_path / "a.txt", numbered_lines(9))], tokenizer)
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert 0 not in ids


def test_evaluation_blocks_rejects(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", "a")
    with pytest.raises(InputError, match="--seq-len must be at least 2, got 1"):
        evaluation_blocks([path], tokenizer, seq_len=1)
    with pytest.raises(InputError, match="the text has 1 tokens, needed are 2; add --text"):
        evaluation_blocks([path], tokenizer, seq_len=4)
    with pytest.raises(InputError, match="is given twice"):
        evaluation_blocks([path, str(path)], tokenizer, seq_len=4)


# Chat


def chat_file(tmp_path: Path) -> Path:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    turns = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]
    return write_rows(tmp_path / "c.jsonl", {"messages": messages}, {"conversations": turns})


def test_chat_with_template(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE
    expected = f"[user]hi[assistant]yo{END}[user]why[assistant]so"
    assert tokenizer.decode(whole([chat_file(tmp_path)], tokenizer)) == expected
    result = evaluation_blocks([chat_file(tmp_path)], tokenizer, seq_len=4)
    assert result.num_bytes == len(expected) - len(END)


def test_chat_without_template(tmp_path, tokenizer):
    ids = whole([chat_file(tmp_path)], tokenizer)
    assert tokenizer.decode(ids) == f"hi\n\nyo{END}why\n\nso"


def test_chat_template_special_tokens_are_not_doubled(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = f"{START}{TEMPLATE}{END}"
    path = chat_file(tmp_path)
    one, two = (f"{START}[user]{a}[assistant]{b}{END}" for a, b in (("hi", "yo"), ("why", "so")))
    assert tokenizer.decode(whole([path], tokenizer)) == one + two
    train, _ = calibrate([path], tokenizer, tokens=30, seq_len=64, held_out_blocks=0, packing=False)
    assert train.mask is not None
    texts = {
        tokenizer.decode(ids[mask]) for ids, mask in zip(train.input_ids, train.mask, strict=True)
    }
    assert texts == {one, two}


def test_chat_template_error_names_the_row(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(InputError, match=r"c\.jsonl:1: the chat template refuses.*must alternate"):
        whole([chat_file(tmp_path)], tokenizer)


# Calibration, packed


def test_calibration_blocks_packed_expected_digest(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "_PIECE_BYTES", 128)
    plain = write(tmp_path / "a.txt", numbered_lines(60))
    rows = write_rows(tmp_path / "b.jsonl", *({"text": f"the row {i}"} for i in range(20)))
    train, held_out = calibrate([plain, rows], tokenizer, tokens=500, seed=3)
    assert train.sha256 == "TRAIN_SHA"
    assert held_out.sha256 == "HELD_SHA"


def test_calibration_blocks_packed_shapes_and_counts(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", numbered_lines(60))
    train, held_out = calibrate([path], tokenizer, tokens=65, held_out_blocks=3)
    assert train.input_ids.shape == (5, 16)
    assert held_out.input_ids.shape == (3, 16)
    assert train.input_ids.dtype == held_out.input_ids.dtype == torch.int64
    assert train.mask is None
    assert held_out.mask is None
    assert (train.num_tokens, held_out.num_tokens) == (80, 48)
    train, held_out = calibrate([path], tokenizer, tokens=64, held_out_blocks=0)
    assert train.input_ids.shape == (4, 16)
    assert held_out.input_ids.shape == (0, 16)


def test_calibration_blocks_seed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "_PIECE_BYTES", 64)
    path = write(tmp_path / "a.txt", numbered_lines(60))
    for packing in (True, False):
        text = numbered_lines(60).replace("\n", "\n\n")
        path = write(tmp_path / "a.txt", text)
        digests = [
            [blocks.sha256 for blocks in calibrate([path], tokenizer, seed=seed, packing=packing)]
            for seed in (0, 0, 1)
        ]
        assert digests[0] == digests[1]
        assert digests[0][0] != digests[2][0]
        assert digests[0][1] != digests[2][1]


@pytest.mark.parametrize("num_held_out", [1, 3, 7])
def test_calibration_blocks_packed_held_out_is_spread_and_disjoint(
    tmp_path, tokenizer, num_held_out
):
    # one piece, so no shuffle: the blocks are the text's, in order
    path = write(tmp_path / "a.txt", numbered_lines(100))
    stream = ids_of(tokenizer, numbered_lines(100))
    blocks = [stream[i : i + 16] for i in range(0, len(stream), 16)]
    train, held_out = calibrate([path], tokenizer, tokens=320, held_out_blocks=num_held_out)
    num_blocks = 20 + num_held_out
    where = [blocks.index(row) for row in held_out.input_ids.tolist()]
    rest = [blocks.index(row) for row in train.input_ids.tolist()]
    assert sorted(where + rest) == list(range(num_blocks))
    edges = [-1, *where, num_blocks]
    gaps = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    assert max(gaps) <= num_blocks / num_held_out + 1


def test_calibration_blocks_samples_from_all_over(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "_PIECE_BYTES", 64)
    path = write(tmp_path / "a.txt", numbered_lines(1000))
    train, _ = calibrate([path], tokenizer, tokens=800)
    text = tokenizer.decode(train.input_ids.flatten())
    numbers = [int(word) for word in text.split() if word.isdigit()]
    assert min(numbers) < 200
    assert max(numbers) > 800


def test_calibration_blocks_tokenises_only_what_is_needed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "_PIECE_BYTES", 64)
    path = write(tmp_path / "a.txt", numbered_lines(2000))
    seen = []
    encode = data._encode

    def counting(texts, *rest):
        seen.extend(texts)
        return encode(texts, *rest)

    monkeypatch.setattr(data, "_encode", counting)
    calibrate([path], tokenizer)
    assert sum(map(len, seen)) < 2000


def test_calibration_blocks_rows_begin_with_bos(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    path = write_rows(tmp_path / "a.jsonl", *({"text": f"abc{i}"} for i in range(9)))
    train, _ = calibrate([path], tokenizer, tokens=48, seq_len=6, held_out_blocks=1)
    # START a b c digit END: rows and blocks have the same length
    assert train.input_ids[:, 0].tolist() == [1] * 8
    assert train.input_ids[:, 5].tolist() == [0] * 8


def test_calibration_blocks_text_longer_than_context_does_not_warn(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", numbered_lines(60))
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        calibrate([path], tokenizer)
        calibrate([path], tokenizer, packing=False, tokens=10, held_out_blocks=0)
        evaluation_blocks([path], tokenizer, seq_len=16)
        assert records == []
        tokenizer(numbered_lines(60))
        assert "longer than the specified maximum" in records[0].getMessage()
    finally:
        logger.removeHandler(handler)


# Calibration, padded


def padded_rows(blocks) -> list[list[int]]:
    """The real tokens of each block; checks that the padding is on the right."""
    lengths = blocks.mask.sum(dim=1).tolist()
    for mask, length in zip(blocks.mask, lengths, strict=True):
        assert mask.tolist() == [True] * length + [False] * (mask.numel() - length)
    return [ids[:n].tolist() for ids, n in zip(blocks.input_ids, lengths, strict=True)]


@pytest.mark.parametrize(("pad", "pad_id"), [(True, 1), (False, 0)], ids=["pad", "eos"])
def test_calibration_blocks_padded_rows_and_mask(tmp_path, pad, pad_id):
    tokenizer = make_tokenizer(pad=pad)
    texts = ["abc" * (i % 7 + 1) + str(i) for i in range(40)]
    path = write_rows(tmp_path / "a.jsonl", *({"text": text} for text in [*texts, "x"]))
    train, held_out = calibrate(
        [path], tokenizer, tokens=120, seq_len=12, held_out_blocks=5, packing=False
    )
    known = [ids_of(tokenizer, text)[:12] for text in texts]
    rows = padded_rows(train) + padded_rows(held_out)
    assert all(row in known for row in rows)
    assert train.mask is not None
    assert (train.mask.dtype, train.input_ids.dtype) == (torch.bool, torch.int64)
    assert train.input_ids.shape == train.mask.shape
    assert set(train.input_ids[~train.mask].tolist()) == {pad_id}
    assert held_out.input_ids.shape == (5, 12)
    # enough, and not one sample more
    lengths = [len(row) for row in padded_rows(train)]
    assert train.num_tokens == sum(lengths)
    assert sum(lengths) >= 120 > sum(lengths[:-1])


def test_calibration_blocks_padded_held_out_is_disjoint_and_from_all_over(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", *({"text": f"{i:03d}"} for i in range(200)))
    train, held_out = calibrate(
        [path], tokenizer, tokens=400, seq_len=4, held_out_blocks=20, packing=False
    )
    train_rows, held_out_rows = (
        {tokenizer.decode(row) for row in padded_rows(blocks)} for blocks in (train, held_out)
    )
    assert len(train_rows) == 134
    assert len(held_out_rows) == 20
    assert not train_rows & held_out_rows
    assert int(min(held_out_rows)) < 50
    assert int(max(held_out_rows)) > 150


def test_calibration_blocks_padded_plain_text_by_paragraphs(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "_PIECE_BYTES", 8)
    text = "\r\none\r\n  two\r\n\r\nthree and a long line\n \t\n\n\nfour\n\nx\n"
    train, held_out = calibrate(
        [write(tmp_path / "a.txt", text)],
        tokenizer,
        tokens=30,
        seq_len=40,
        held_out_blocks=0,
        packing=False,
    )
    decoded = {tokenizer.decode(row) for row in padded_rows(train)}
    # "x" is one token: no sample
    assert decoded == {"one\r\n  two", "three and a long line", "four"}
    assert held_out.input_ids.shape == (0, 40)


def test_calibration_blocks_padded_has_no_mask_if_all_real(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", *({"text": "abcdef" * 10} for _ in range(5)))
    train, held_out = calibrate([path], tokenizer, tokens=48, packing=False)
    assert train.mask is None
    assert held_out.mask is None
    assert train.num_tokens == 48


def test_calibration_blocks_padded_adds_bos(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    path = write_rows(tmp_path / "a.jsonl", *({"text": "ab"} for _ in range(9)))
    train, _ = calibrate([path], tokenizer, tokens=9, seq_len=4, packing=False)
    assert padded_rows(train) == [[1, *ids_of(tokenizer, "ab")]] * 3


def test_token_blocks_digest_covers_ids_mask_and_shape():
    ids = torch.arange(6).view(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    other_mask = mask.clone()
    other_mask[0, 2] = False
    blocks = [
        data.TokenBlocks(ids),
        data.TokenBlocks(ids.view(3, 2)),
        data.TokenBlocks(ids + 1),
        data.TokenBlocks(ids, mask),
        data.TokenBlocks(ids, other_mask),
    ]
    assert len({b.sha256 for b in blocks}) == 5
    assert data.TokenBlocks(ids.t().contiguous().t()).sha256 == blocks[0].sha256
    assert [b.num_tokens for b in blocks] == [6, 6, 6, 6, 5]


# Calibration, errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "--tokens must be at least 1, got 0"),
        ({"seq_len": 1}, "--seq-len must be at least 2, got 1"),
        ({"held_out_blocks": -1}, "held_out_blocks must be at least 0, got -1"),
        (
            {"tokens": 1000},
            r"too short: 20 tokens, needed are 1040 \(65 blocks of 16, 2 of them held out\); "
            "lower --tokens or add --text",
        ),
        (
            {"tokens": 1000, "packing": False},
            "too short: 18 tokens in 2 samples of at most 16, needed are 1000 to train and "
            "2 samples held out; lower --tokens, add --text",
        ),
        ({"tokens": 16, "packing": False}, "too short: 18 tokens in 2 samples"),
    ],
)
def test_calibration_blocks_rejects(tmp_path, tokenizer, options, message):
    path = write(tmp_path / "a.txt", "123456789\n\n123456789")
    with pytest.raises(InputError, match=message) as caught:
        calibrate([path], tokenizer, **options)
    assert "\n" not in str(caught.value)


def test_calibration_blocks_exactly_enough(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", "x" * 96)
    train, held_out = calibrate([path], tokenizer)
    assert (train.num_tokens, held_out.num_tokens) == (64, 32)
    with pytest.raises(InputError, match="too short: 96 tokens, needed are 112"):
        calibrate([path], tokenizer, tokens=65)


def test_calibration_blocks_rejects_bad_files(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", numbered_lines(60))
    with pytest.raises(InputError, match="is given twice"):
        calibrate([path, tmp_path / "." / "a.txt"], tokenizer)
    with pytest.raises(InputError, match="check the path"):
        calibrate([path, tmp_path / "b.txt"], tokenizer)
    with pytest.raises(InputError, match="too short: 0 tokens"):
        calibrate([], tokenizer)
