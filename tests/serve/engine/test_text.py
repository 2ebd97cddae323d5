"""Streamed text: pieces join to the whole, no half characters, nothing of a stop string."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lillama.serve.engine.text import TextStream


@pytest.fixture(scope="module")
def spaced() -> PreTrainedTokenizerFast:
    """As Llama's: words carry their leading space, which decoding drops in front; bytes for what
    is in no word."""
    words = ["▁the", "▁cat", "s", "▁", ".", "at", "▁“", *"abcdehinostuvï"]
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    scores = [(piece, -float(i > 2) - (len(piece) == 1)) for i, piece in enumerate(pieces)]
    backend = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(params=["byte_level", "spaced"])
def any_tokenizer(request):
    return request.getfixturevalue({"byte_level": "tokenizer"}.get(request.param, request.param))


def pieces_of(tokenizer, ids, stop=()) -> tuple[list[str], bool]:
    stream, pieces = TextStream(tokenizer, stop), []
    for token_id in ids:
        piece, stopped = stream.push(token_id)
        pieces.append(piece)
        if stopped:
            return pieces, True
    piece, stopped = stream.finish()
    return [*pieces, piece], stopped


def whole(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_text_pieces_join_to_the_whole_for_any_tokens(tokenizer):
    """Random tokens: most byte sequences among them are no characters."""
    source = random.Random(1)
    for length in (1, 2, 3, 10, 60):
        for _ in range(60):
            ids = [source.randrange(len(tokenizer)) for _ in range(length)]
            assert "".join(pieces_of(tokenizer, ids)[0]) == whole(tokenizer, ids), ids


def test_text_pieces_join_to_the_whole_with_byte_fallback(spaced):
    """Words, special tokens, characters of many bytes, and bytes that are no character."""

    def tokens(*names: str) -> list[int]:
        return [spaced.convert_tokens_to_ids(name) for name in names]

    def byte_tokens(text: str) -> list[int]:
        return tokens(*(f"<0x{byte:02X}>" for byte in text.encode()))

    broken = [tokens("s", f"<0x{byte:02X}>", "s") for byte in (0x80, 0xE2, 0xFF)]
    units = [tokens(name) for name in ("▁the", "▁cat", "s", "▁", "<s>", "<unk>")]
    units += [byte_tokens(text) for text in ("é", "€", "🙂", "\n")] + broken
    source = random.Random(1)
    for length in (1, 2, 3, 10, 40):
        for _ in range(60):
            ids = [token for _ in range(length) for token in source.choice(units)]
            assert "".join(pieces_of(spaced, ids)[0]) == whole(spaced, ids), ids


def test_text_characters_before_a_broken_byte_stay(spaced):
    names = ["▁the", "<0xC3>", "<0xA9>", "<0xFF>", "<0xFE>", "s"]
    pieces, _ = pieces_of(spaced, spaced.convert_tokens_to_ids(names))
    assert "".join(pieces) == "theé\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}s"


@pytest.mark.parametrize(
    "text", ["the cat sat. ", "naïve 日本語 🙂🙃 end", " two  spaces\n\nand é"]
)
def test_text_never_shows_half_a_character(text, any_tokenizer):
    ids = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, _ = pieces_of(any_tokenizer, ids)
    assert "".join(pieces) == whole(any_tokenizer, ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert sum(map(bool, pieces)) > 3, "streamed, not kept to the end"


def test_text_keeps_the_space_after_a_special_token(spaced):
    names = ["<s>", "▁the", "</s>", "▁cat", "<s>", "<s>", "s", "▁cat"]
    ids = spaced.convert_tokens_to_ids(names)
    assert "".join(pieces_of(spaced, ids)[0]) == "the cats cat" == whole(spaced, ids)


def test_text_decodes_a_bounded_number_of_ids(tokenizer):
    ids = tokenizer("the cat sat on a mat. " * 200)["input_ids"]
    stream = TextStream(tokenizer)
    for token_id in ids:
        stream.push(token_id)
        assert len(stream._ids) <= 4


def test_text_unfinished_character_is_given_at_the_end(tokenizer):
    ids = tokenizer("a🙂")["input_ids"][:-1]
    pieces, _ = pieces_of(tokenizer, ids)
    assert pieces[0] == "a" and "".join(pieces) == whole(tokenizer, ids)
    assert pieces[-1].endswith("\N{REPLACEMENT CHARACTER}")


def test_text_of_a_tokenizer_without_a_fast_backend(tokenizer):
    class Slow:
        """Only what every tokenizer of transformers has."""

        decode, convert_ids_to_tokens = tokenizer.decode, tokenizer.convert_ids_to_tokens

    ids = tokenizer("naïve 日本 🙂🙃 end")["input_ids"]
    assert pieces_of(Slow(), ids) == pieces_of(tokenizer, ids)


# Stop strings
STOPS = {
    "inside a token": ("the cat sat on", ("at",), "the c"),
    "over tokens": ("the cat sat on", ("t s",), "the ca"),
    "whole tokens": ("the cat sat on", (" cat sat",), "the"),
    "the earliest of two": ("the cat sat on", ("sat", "cat"), "the "),
    "a false beginning": ("on on ona mat", ("on ona m",), "on "),
    "its own beginning": ("aaab aab", ("aab",), "a"),
    "of many bytes": ("the 🙂🙃 cat", ("🙃",), "the 🙂"),
    "at the start": ("the cat", ("the",), ""),
    "not there": ("the cat sat on", ("dog", "on a"), None),
}


@pytest.mark.parametrize("case", STOPS)
def test_text_ends_before_the_first_stop_string(case, any_tokenizer):
    text, stop, wanted = STOPS[case]
    ids = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    text = whole(any_tokenizer, ids)
    pieces, stopped = pieces_of(any_tokenizer, ids, stop)
    assert stopped == (wanted is not None)
    assert "".join(pieces) == (text if wanted is None else wanted)


def test_text_stop_strings_agree_with_a_search_of_the_whole(any_tokenizer):
    source = random.Random(2)
    for _ in range(300):
        text = "".join(source.choice("ab ") for _ in range(30))
        stop = tuple({"".join(source.choice("ab ") for _ in range(3)) for _ in range(2)})
        ids = any_tokenizer(text, add_special_tokens=False)["input_ids"]
        text = whole(any_tokenizer, ids)
        ends = [text.find(s) for s in stop if s in text]
        pieces, stopped = pieces_of(any_tokenizer, ids, stop)
        # of two that overlap, the one that is complete first ends the text
        assert stopped == bool(ends)
        joined = "".join(pieces)
        assert text.startswith(joined) and not any(s in joined for s in stop)
        if not ends:
            assert joined == text


def test_text_holds_back_no_more_than_it_must(tokenizer):
    stream = TextStream(tokenizer, ["sat down"])
    given = [stream.push(token_id)[0] for token_id in tokenizer("the cat sat on")["input_ids"]]
    assert "".join(given) == "the cat sat on"
