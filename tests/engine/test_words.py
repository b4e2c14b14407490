"""The tokens of words seen before: a text of them has the tokens that its tokenizer gives it, whatever it holds."""

from __future__ import annotations

from collections.abc import Callable
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


def cased(backend: Any) -> None:
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False, handle_chinese_chars=False)


def with_added_tokens(backend: Any) -> None:
    """Some of which a text has only once its letters are small."""
    backend.add_special_tokens(
        [
            AddedToken("covid", normalized=False),
            AddedToken("New York", normalized=False),
            AddedToken("<mask>", normalized=False, lstrip=True),
            AddedToken("cat", normalized=False, single_word=True),
        ]
    )


def with_normalized_tokens(backend: Any) -> None:
    backend.add_tokens([AddedToken("\u212a b", normalized=True), AddedToken("|||X|||", normalized=True)])


#: name -> the family whose tokenizer it is, and how that is changed
KINDS: dict[str, tuple[str, Callable[[Any], None] | None]] = {
    "bert": ("bert", None),
    "cased bert": ("bert", cased),
    "bert and more": ("bert", with_added_tokens),
    "modernbert": ("modernbert", None),
    "modernbert and more": ("modernbert", with_added_tokens),
    "modernbert and normalized": ("modernbert", with_normalized_tokens),
}
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
    *("covid", "COVID", "Covid19", "New York", "new york", " <mask>", "cat", "cats", "K b", "|||X|||"),
    *("[CLS]", "[SEP]", "[cls]", "[UNK", "[MASK]", "[PAD] "),
)
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12).map("".join)


def tokenizer(kind: str) -> Any:
    family, change = KINDS[kind]
    backend = models._tokenizer(family).backend_tokenizer
    if change:
        change(backend)
    return backend


def alone(library: Tokenizer, text: str) -> list[int]:
    library.no_truncation()
    tokens: list[int] = library.encode(text, add_special_tokens=False).ids
    return tokens


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest) -> tuple[WordTokenizer, Tokenizer]:
    """By words, and as the library does it."""
    backend = tokenizer(request.param)
    return WordTokenizer(backend), Tokenizer.from_str(backend.to_str())


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.integers(3, 24), st.sampled_from(["right", "left"])
)
@example([("OK bread", "K b COVID and Covid")], 24, "left")
@example([("a\x1cb", "c\u0338 d"), ("", ""), ("İ ΑΣ", "  \n x")], 24, "right")
def test_any_text_has_the_library_s_tokens(
    both: tuple[WordTokenizer, Tokenizer], pairs: list[tuple[str, str]], limit: int, side: str
) -> None:
    by_words, library = both
    library.enable_truncation(limit, direction=side)
    encodings = library.encode_batch(pairs)
    found = by_words.pairs(*zip(*pairs, strict=True), limit, side)
    for pair, encoding, tokens in zip(pairs, encodings, found, strict=True):
        if tokens is None:
            assert encoding.sequence_ids.count(0) < len(alone(library, pair[0])), "its query is not cut"
        else:
            assert (tokens.ids, tokens.types) == (encoding.ids, encoding.type_ids)
            assert tokens.truncated == bool(encoding.overflowing)


@settings(deadline=None, max_examples=150)
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


def words(start: int, count: int) -> str:
    """A text of so many words that no other number gives."""
    return " ".join(
        f"w{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}{chr(97 + n // 676)}" for n in range(start, start + count)
    )


@pytest.mark.parametrize("at_once", [10, 300])
def test_what_is_remembered_has_a_bound(
    at_once: int, both: tuple[WordTokenizer, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_words, library = both
    monkeypatch.setattr(module, "MOST_WORDS", 20)
    for start in range(0, 900, at_once):
        text = words(start, at_once)
        assert by_words.tokens([text])[text] == alone(library, text)
        assert len(by_words._known) <= 20


def test_where_most_words_are_new_texts_are_tokenized_whole_for_a_while(
    both: tuple[WordTokenizer, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_words, library = both
    monkeypatch.setattr(module, "WORDS_OF_A_LOOK", 50)
    by_words = WordTokenizer(by_words._backend)
    asked: list[str] = []
    ask = by_words._ask
    monkeypatch.setattr(by_words, "_ask", lambda words: asked.extend(words) or ask(words))

    def rounds(of: Callable[[int], str]) -> list[bool]:
        """For each of some texts, whether words of it were asked for."""
        found = []
        for n in range(60):
            asked.clear()
            text = of(n)
            assert by_words.tokens([text])[text] == alone(library, text)
            found.append(bool(asked))
        return found

    share = sum(rounds(lambda n: words(10 * n, 10))) / 60
    assert 0 < share < 0.3
    rounds(lambda n: "the same words again and again")
    assert by_words._without == 0
    assert not any(rounds(lambda n: "the same words again"))
    assert {"again", " again"} & by_words._known.keys()


def test_what_others_set_is_set_anew(both: tuple[WordTokenizer, Tokenizer]) -> None:
    by_words, library = both
    by_words._backend.enable_truncation(3)
    by_words._backend.enable_padding(length=40)
    text = "Bread is baked of flour, water, salt and yeast."
    assert by_words.tokens([text])[text] == alone(library, text)


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
    engine = Engine(ModelSpec(models.build(family, tmp_path)), "cpu", None, 256).optimize()
    cutter = engine.model.tokenizer.backend_tokenizer.pre_tokenizer
    known = isinstance(cutter, pre_tokenizers.ByteLevel) and not cutter.add_prefix_space
    assert known or family not in ("ettin", "modernbert")
    assert engine.recipe.pipeline == ("words" if known else "backend")


def change_normalizer(backend: Any) -> None:
    backend.normalizer = normalizers.Sequence([normalizers.Replace("a b", "c"), backend.normalizer])


def keep_control_characters(backend: Any) -> None:
    backend.normalizer = normalizers.BertNormalizer(clean_text=False)


def add_a_normalized_token(backend: Any) -> None:
    backend.add_tokens([AddedToken("new york", normalized=True)])


def add_many_tokens(backend: Any) -> None:
    backend.add_special_tokens([AddedToken(f"{n}<x>", normalized=False) for n in range(100, 200)])


def choose_at_random(backend: Any) -> None:
    backend.model = tokenizer("modernbert").model
    backend.normalizer, backend.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    WordTokenizer(backend)
    backend.model.dropout = 0.5


def cut_elsewhere(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.Whitespace()


@pytest.mark.parametrize(
    "change",
    [
        *(change_normalizer, keep_control_characters, add_a_normalized_token),
        *(add_many_tokens, choose_at_random, cut_elsewhere),
    ],
    ids=lambda f: f.__name__,
)
def test_a_tokenizer_that_looks_beyond_a_word_is_refused(change: Any) -> None:
    backend = tokenizer("bert")
    WordTokenizer(backend)
    change(backend)
    with pytest.raises(ValueError, match=r"word by word|normalized text|added tokens of 1.. kinds"):
        WordTokenizer(backend)


def test_a_pair_that_is_not_query_and_document_is_refused() -> None:
    backend = tokenizer("bert")
    backend.post_processor = models._template(backend, "[CLS] $A", "[CLS] $B [SEP] $A:1", "[CLS]", "[SEP]")
    with pytest.raises(ValueError, match="a query and a document"):
        WordTokenizer(backend)
