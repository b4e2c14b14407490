"""The tokens of words seen before: a text of them has the tokens that its tokenizer gives it, whatever it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers  # noqa: E402

from mp_rerank._engine import words as module  # noqa: E402
from mp_rerank._engine.engine import Engine  # noqa: E402
from mp_rerank._engine.words import WordTokenizer  # noqa: E402

pytestmark = pytest.mark.real

KINDS = ("bert", "modernbert")
FRAGMENTS = (
    *(
        "the",
        "Birds",
        "BREAD",
        "it's",
        "'ll",
        "don''t",
        "3.14",
        "x1y2",
        "a_b",
        "n\u0303",
        "Köln",
        "İ",
        "Σας",
        "東京",
        "🙂",
    ),
    *(
        " ",
        "  ",
        "   ",
        "\n",
        "\r\n",
        "\t",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x7f",
        "\x85",
        "\xa0",
        "\u2028",
        "\u3000",
        "\u200b",
    ),
    *(".", "...", "-", "!", "(", "]", "$", "^", "`", "~", "\u0338", "\u037e", "\u212a", "\ufffd", "\x00", "“", "–"),
    *("'s", "'re", "'m", "\n\n", "\t  x", " \n"),
    *("[CLS]", "[SEP]", "[cls]", "[UNK", "[MASK]", "[PAD] "),
)
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12).map("".join)


def tokenizer(kind: str) -> Any:
    return models._tokenizer(kind).backend_tokenizer


def alone(library: Tokenizer, text: str) -> list[int]:
    library.no_truncation()
    tokens: list[int] = library.encode(text, add_special_tokens=False).ids
    return tokens


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest) -> tuple[WordTokenizer, Tokenizer]:
    """By words, and as the library does it."""
    backend = tokenizer(request.param)
    return WordTokenizer(backend), Tokenizer.from_str(backend.to_str())


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.integers(3, 24), st.sampled_from(["right", "left"])
)
@example([("a\x1cb", "c\u0338 d"), ("", ""), ("İ ΑΣ", "  \n x")], 24, "right")
def test_any_text_has_the_library_s_tokens(
    both: tuple[WordTokenizer, Tokenizer], pairs: list[tuple[str, str]], limit: int, side: str
) -> None:
    by_words, library = both
    library.enable_truncation(limit, direction=side)
    encodings = library.encode_batch(pairs)
    found = by_words.pairs(*zip(*pairs, strict=True), limit, side)
    for pair, encoding, tokens in zip(pairs, encodings, found, strict=True):
        if tokens is None:  # its query would be cut
            assert encoding.overflowing
            assert alone(library, pair[0])
        else:
            assert (tokens.ids, tokens.types) == (encoding.ids, encoding.type_ids)
            assert tokens.truncated == bool(encoding.overflowing)


@settings(deadline=None, max_examples=300)
@given(texts.filter(str.isascii))
def test_words_are_what_the_tokenizer_cuts_a_text_into(text: str) -> None:
    """Not only tokens are the same: a vocabulary may have a token for any part of a word."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert module.GPT2_WORD.findall(text) == [text[start:end] for _, (start, end) in pieces]


def test_a_word_is_asked_for_once(both: tuple[WordTokenizer, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    by_words, _ = both
    asked: list[str] = []
    ask = by_words._ask
    monkeypatch.setattr(by_words, "_ask", lambda words: asked.extend(words) or ask(words))
    by_words.pairs(["Who wanders, and whither?"] * 2, ["Nobody wanders.", "Somebody wanders, and somebody stays."], 64)
    assert len(asked) == len(set(asked))
    assert sum("wanders" in word for word in asked) == 1
    asked.clear()
    by_words.pairs(["Who stays?"], ["Somebody wanders."], 64)
    assert all("wanders" not in word for word in asked)


def test_what_is_remembered_has_a_bound(both: tuple[WordTokenizer, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    by_words, library = both
    monkeypatch.setattr(module, "MOST_WORDS", 20)
    for start in range(0, 400, 10):
        text = " ".join(f"w{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(start, start + 10))
        assert by_words.tokens([text])[text] == alone(library, text)
        assert len(by_words._known) <= 20 + 10


def test_a_word_without_end_is_not_remembered(both: tuple[WordTokenizer, Tokenizer]) -> None:
    by_words, library = both
    text = "bread " + "breadless" * 1000 + " bread"
    assert by_words.tokens([text])[text] == alone(library, text)
    assert max(map(len, by_words._known)) <= module.LONGEST_WORD


def test_a_query_that_would_be_cut_is_left_to_the_library(both: tuple[WordTokenizer, Tokenizer]) -> None:
    by_words, _ = both
    short, long = by_words.pairs(["bread", "bread " * 20], ["bread " * 20] * 2, 16)
    assert short is not None
    assert short.truncated
    assert len(short.ids) == 16
    assert long is None


def test_pairs_whose_query_is_cut_score_as_predict_s(tmp_path: Path) -> None:
    folder = models.build("bert", tmp_path)
    fast, plain = Engine(ModelSpec(folder), "cpu", None, 256).optimize(), models.load(folder, "cpu")
    assert fast.recipe.pipeline == "words"
    long = "Birds fly because their wings give lift. " * 30
    pairs = [("Why?", "Lift."), (long, "Lift."), (long, long), ("Why?", long), ("Birds [MASK] fly", "Why [SEP] fly?")]
    np.testing.assert_allclose(fast.predict(pairs), plain.predict(pairs), rtol=1e-5, atol=1e-5)
    assert list(fast.readings.truncated) == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("family", ["ettin", "modernbert", "roberta", "xlm-roberta", "deberta-v2", "qwen3"])
def test_only_tokenizers_that_are_known_go_by_words(family: str, tmp_path: Path) -> None:
    if family not in models.FAMILIES:
        pytest.skip("this sentence-transformers has no such models")
    recipe = Engine(ModelSpec(models.build(family, tmp_path)), "cpu", None, 256).optimize().recipe
    assert recipe.pipeline == ("words" if family in ("ettin", "modernbert") else "backend")


def change_normalizer(backend: Any) -> None:
    backend.normalizer = normalizers.Sequence([normalizers.Replace("a b", "c"), backend.normalizer])


def keep_control_characters(backend: Any) -> None:
    backend.normalizer = normalizers.BertNormalizer(clean_text=False)


def add_a_normalized_token(backend: Any) -> None:
    backend.add_tokens([AddedToken("new york", normalized=True)])


def cut_elsewhere(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.Whitespace()


@pytest.mark.parametrize(
    "change",
    [change_normalizer, keep_control_characters, add_a_normalized_token, cut_elsewhere],
    ids=lambda f: f.__name__,
)
def test_a_tokenizer_that_looks_beyond_a_word_is_refused(change: Any) -> None:
    backend = tokenizer("bert")
    WordTokenizer(backend)
    change(backend)
    with pytest.raises(ValueError, match=r"word by word|normalized text"):
        WordTokenizer(backend)


def test_a_pair_that_is_not_query_and_document_is_refused() -> None:
    backend = tokenizer("bert")
    backend.post_processor = models._template(backend, "[CLS] $A", "[CLS] $B [SEP] $A:1", "[CLS]", "[SEP]")
    with pytest.raises(ValueError, match="a query and a document"):
        WordTokenizer(backend)
