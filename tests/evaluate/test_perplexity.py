"""eval --metric: rows and words, each against a computation by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import lillama
from lillama.errors import InputError
from lillama.evaluate.perplexity import NOT_SCORED, scored_text
from lillama.evaluate.wikitext import detokenized, pages_of

T = 24
# Two pages, with what WikiText has: titles of three depths, spaces around marks, blank lines
WIKI = """ 
 = The old cat = 
 
 The cat 's " green mat " , which saw 1 @,@ 200 dogs ( some old ) @-@ ran past : nobody saw them . 
 
 = = Some dogs = = 
 
 while old dogs ran past some green hills and nobody saw them go , the cat sat on a mat 
 
 = A mat = 
 
 on a mat .
"""  # noqa: W291, W293


@pytest.fixture(scope="module")
def wiki(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wiki") / "wiki.test.raw"
    path.write_text(WIKI, "utf-8")
    return path


def rows(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), "utf-8")
    return path


@torch.no_grad()
def log_prob(model, context: list[int], token: int) -> float:
    logits = model(torch.tensor([context])).logits[0, -1]
    return float(F.log_softmax(logits.double(), -1)[token])


@pytest.mark.parametrize(
    ("page", "wanted"),
    [
        ("a guest @-@ star , 1 @,@ 000 or 2 @.@ 5 . \n", "a guest-star, 1,000 or 2.5.\n"),
        ('the episode " Teddy \'s Story " of', 'the episode "Teddy\'s Story" of'),
        ("( born 1986 ) [ sic ] { x }", "(born 1986) [sic] {x}"),
        (" = = Career = = \n", " == Career ==\n"),
        ("40 \u00b0 F ; actors ' union : N men", "40\u00b0F; actors' union: 1 men"),
    ],
)
def test_detokenized_takes_the_spaces_out(page, wanted):
    assert detokenized(page) == wanted


def test_pages_begin_at_titles_and_rows_are_pages(wiki, tmp_path):
    pages = pages_of(wiki)
    assert [page.split("\n")[0] for page in pages] == [" = The old cat = ", " = A mat = "]
    assert "= = Some dogs = =" in pages[0] and "\n".join(pages) == WIKI.split("\n", 1)[1]
    for key in ("page", "text"):
        assert pages_of(rows(tmp_path / f"{key}.jsonl", [*pages, " \n"], key)) == pages


def test_rows_are_joined_by_empty_lines_and_the_rest_is_dropped(wiki, tmp_path, mamba, tokenizer):
    lines = WIKI.splitlines(keepends=True)
    joined = "\n\n".join(line if line.strip() else "" for line in lines)
    ids = tokenizer(joined)["input_ids"]
    assert len(ids) % T >= 2, "the case this test is about"
    model = AutoModelForCausalLM.from_pretrained(mamba)
    blocks = torch.tensor(ids[: len(ids) // T * T]).view(-1, T)
    with torch.no_grad():
        losses = [float(model(block[None], labels=block[None]).loss) for block in blocks]
    report = lillama.eval(mamba, wiki, metric="rows", seq_len=T)
    assert report["metric"] == "rows" and report["tokens"] == len(blocks) * (T - 1)
    mean = sum(losses) / len(losses)
    assert report["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    per_byte = mean / math.log(2) * len(ids) / len(joined.encode())
    assert report["bits_per_byte"] == pytest.approx(per_byte, rel=1e-5)
    # the same rows as jsonl, with those that are empty
    file = rows(tmp_path / "rows.jsonl", [line if line.strip() else "" for line in lines])
    assert lillama.eval(mamba, file, metric="rows", seq_len=T) == report


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_words_scores_every_token_once_and_counts_the_words_before(kind, request, wiki, tokenizer):
    path = request.getfixturevalue(kind)
    model = AutoModelForCausalLM.from_pretrained(path)
    total, tokens, words, num_bytes = 0.0, 0, 0, 0
    for page in pages_of(wiki):
        ids = tokenizer(detokenized(page))["input_ids"]
        whole = [tokenizer.bos_token_id, *ids]
        for i, token in enumerate(ids):
            # a full window ends at the page's end at the latest, and starts T tokens before
            end = min((i // T + 1) * T, len(ids))
            total += log_prob(model, whole[max(0, end - T) : i + 1], token)
        tokens += len(ids)
        words += len(page.split()) + (page[0].isspace() + page[-1].isspace())
        num_bytes += len(page.encode())
    report = lillama.eval(path, wiki, metric="words", seq_len=T, batch_size=2)
    assert (report["tokens"], report["words"]) == (tokens, words)
    wanted = {
        "word_perplexity": math.exp(-total / words),
        "byte_perplexity": math.exp(-total / num_bytes),
        "bits_per_byte": -total / num_bytes / math.log(2),
        "token_perplexity": math.exp(-total / tokens),
    }
    assert {name: report[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_words_against_itself_retains_everything_and_says_no_perplexity(mixtral, wiki):
    report = lillama.eval(mixtral, wiki, metric="words", seq_len=T, against=mixtral)
    assert report["retained"] == report["top1_agreement"] == 1
    assert report["base_word_perplexity"] == report["word_perplexity"]
    assert "perplexity" not in report, "a word's and a token's perplexity share no name"
    assert (report["base_params"], report["base_bytes"]) == (report["params"], report["bytes"])


def test_words_takes_the_models_context_by_default(mixtral, mamba, wiki, tokenizer):
    longest = max(len(tokenizer(detokenized(page))["input_ids"]) for page in pages_of(wiki))
    assert longest < 512, "both have more context than a page has tokens"
    for path in (mixtral, mamba):
        assert lillama.eval(path, wiki, metric="words") == lillama.eval(
            path, wiki, metric="words", seq_len=512
        )


@pytest.mark.parametrize("length", [1, T - 1, T, T + 1, 2 * T, 2 * T + 1])
def test_words_windows_never_exceed_seq_len(length, tmp_path, tokenizer):
    page = "the" * length
    tokens = len(tokenizer(page)["input_ids"])
    file = rows(tmp_path / "page.jsonl", [page], "page")
    text = scored_text("words", [file], tokenizer, seq_len=T, batch_size=1)
    assert text.num_tokens == tokens
    assert sum(int((targets != NOT_SCORED).sum()) for _, targets in text.batches) == tokens
    assert all(ids.shape[1] == min(T, tokens) for ids, _ in text.batches)


def test_words_without_a_token_to_start_with_is_refused(wiki, tokenizer):
    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(InputError, match="bos or eos"):
        scored_text("words", [wiki], Bare(), seq_len=T, batch_size=1)


def test_rows_too_short_for_a_block_and_chats_are_refused(mamba, wiki, tmp_path):
    with pytest.raises(InputError, match="needs full blocks of 2048; lower --seq-len"):
        lillama.eval(mamba, wiki, metric="rows")
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "the cat"}]}\n', "utf-8")
    for metric in ("rows", "words"):
        with pytest.raises(InputError, match="is a chat; --metric rows and words need rows"):
            lillama.eval(mamba, chat, metric=metric)
        with pytest.raises(InputError, match="check the path"):
            lillama.eval(mamba, tmp_path / "none.jsonl", metric=metric)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "pages"}, "--metric must be one of blocks, rows, words, got 'pages'"),
        ({"generations": -1}, "--generations must be at least 0"),
        ({"limit": 3}, "--limit is about tasks; name them with --tasks"),
        ({"task_path": "x"}, "--task-path is about tasks"),
        ({"text": (), "tasks": ("t",), "speed": True}, "--speed is about text"),
        ({"text": (), "tasks": ("t",), "metric": "words"}, "--metric is about text"),
        ({"text": (), "tasks": ("t",), "seq_len": 8}, "--seq-len is about text"),
    ],
)
def test_eval_refuses_options_without_effect(options, message, mamba, wiki):
    with pytest.raises(InputError) as caught:
        lillama.eval(mamba, **{"text": wiki, **options})
    assert message in str(caught.value)
