"""What each dialect's clients say, and what they hear: to the letter."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import FAKE
from fakes import score_of
from serving import Running, serving

from mp_rerank import ModelSpec

QUERY = "how do birds fly?"
DOCUMENTS = ["Bread is baked.", "Wings give lift.", "Water is wet."]
LOGITS = [score_of(QUERY, document) for document in DOCUMENTS]
ORDER = sorted(range(3), key=lambda i: -LOGITS[i])


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


SCORES = [pytest.approx(sigmoid(logit), abs=1e-6) for logit in LOGITS]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    salted = ModelSpec("salted", loader="fakes:load_salted")
    three = ModelSpec("three", loader="fakes:load_three_labels")
    models = {"fake": FAKE, "other": salted, "three": three, "nan": ModelSpec("nan", loader="fakes:load_with_nan")}
    with serving(models, {"workers": 1}, aliases={"rerank-v3.5": "fake"}) as running:
        yield running


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


def test_tei(http: httpx.Client) -> None:
    answer = http.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS})
    assert answer.status_code == 200
    assert answer.json() == [{"index": i, "score": SCORES[i]} for i in ORDER]
    said = {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True, "return_text": True, "truncate": True}
    raw = http.post("/rerank", json={**said, "truncation_direction": "Right"}).json()
    assert raw == [{"index": i, "score": LOGITS[i], "text": DOCUMENTS[i]} for i in ORDER]
    assert int(answer.headers["x-compute-characters"]) == len(QUERY) + sum(map(len, DOCUMENTS))
    assert answer.headers["x-total-time"] == answer.headers["x-compute-time"]
    parts = [int(answer.headers[f"x-{part}-time"]) for part in ("queue", "inference")]
    assert all(0 <= part <= int(answer.headers["x-total-time"]) + 1 for part in parts)
    assert answer.headers["x-compute-type"] == "cpu"


def test_jina_and_vllm(http: httpx.Client) -> None:
    said = {"model": "fake", "query": QUERY, "documents": DOCUMENTS, "top_n": 2}
    answer = http.post("/rerank", json=said).json()
    assert answer["model"] == "fake"
    assert answer["results"] == [
        {"index": i, "relevance_score": SCORES[i], "document": {"text": DOCUMENTS[i]}} for i in ORDER[:2]
    ]
    assert set(answer["usage"]) >= {"total_tokens", "prompt_tokens"}
    bare = http.post("/rerank", json={**said, "return_documents": False, "raw_scores": True}).json()
    assert bare["results"] == [{"index": i, "relevance_score": LOGITS[i]} for i in ORDER[:2]]


def test_cohere_v1_has_documents_that_are_objects(http: httpx.Client) -> None:
    documents = [{"text": DOCUMENTS[0], "page": 7}, DOCUMENTS[1], {"text": DOCUMENTS[2]}]
    said = {"model": "rerank-v3.5", "query": QUERY, "documents": documents}
    answer = http.post("/v1/rerank", json={**said, "return_documents": True}).json()
    given = [documents[0], {"text": DOCUMENTS[1]}, documents[2]]
    assert answer["results"] == [{"index": i, "relevance_score": SCORES[i], "document": given[i]} for i in ORDER]
    assert answer["meta"]["api_version"] == {"version": "1"}
    assert "document" not in http.post("/v1/rerank", json=said).json()["results"][0]
    by_fields = [{"title": "Birds", "body": "Wings give lift.", "id": 3}]
    ranked = http.post(
        "/v1/rerank",
        json={"query": QUERY, "documents": by_fields, "rank_fields": ["title", "body"], "raw_scores": True},
    ).json()["results"]
    assert ranked[0]["relevance_score"] == score_of(QUERY, "title: Birds\nbody: Wings give lift.")


def test_cohere_v2(http: httpx.Client) -> None:
    said = {"model": "fake", "query": QUERY, "documents": DOCUMENTS, "top_n": 1}
    answer = http.post("/v2/rerank", json={**said, "priority": 999}).json()
    assert set(answer) == {"id", "results", "meta"}
    assert answer["results"] == [{"index": ORDER[0], "relevance_score": SCORES[ORDER[0]]}]
    assert answer["meta"]["billed_units"] == {"search_units": 1}


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_vllms_score(http: httpx.Client, path: str) -> None:
    answer = http.post(path, json={"model": "fake", "text_1": QUERY, "text_2": DOCUMENTS}).json()
    assert answer["data"] == [{"index": i, "object": "score", "score": SCORES[i]} for i in range(3)]
    one = http.post(path, json={"text_1": QUERY, "text_2": DOCUMENTS[0], "use_activation": False}).json()
    assert [item["score"] for item in one["data"]] == LOGITS[:1]
    each = http.post(path, json={"text_1": ["a", "b"], "text_2": ["c", "d"], "use_activation": False}).json()
    assert [item["score"] for item in each["data"]] == [score_of("a", "c"), score_of("b", "d")]
    assert http.post(path, json={"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}).status_code == 400


def test_open_webui_reads_index_and_score(http: httpx.Client) -> None:
    for path in ("/rerank", "/v1/rerank"):
        said = {"model": "", "query": QUERY, "documents": DOCUMENTS, "top_n": len(DOCUMENTS)}
        results = http.post(path, json=said, headers={"Authorization": "Bearer none"}).json()["results"]
        in_order = sorted(results, key=lambda result: int(result["index"]))
        assert [result["relevance_score"] for result in in_order] == SCORES


def test_our_own_options_are_fields_of_every_dialect(http: httpx.Client) -> None:
    least = sigmoid(LOGITS[ORDER[1]]) - 1e-6
    said = {"query": QUERY, "min_score": least, "timeout": 60, "on_timeout": "partial"}
    assert len(http.post("/rerank", json={**said, "texts": DOCUMENTS, "priority": 3}).json()) == 2
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        assert len(http.post(path, json={**said, "documents": DOCUMENTS}).json()["results"]) == 2


def test_an_option_that_the_model_cannot_follow(http: httpx.Client) -> None:
    for option in ({"truncate": False}, {"truncation_direction": "Left"}, {"instruction": "judge"}):
        answer = http.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS, **option})
        assert (answer.status_code, "it needs a CrossEncoder" in answer.json()["error"]) == (422, True)


def test_the_first_model_is_meant_where_none_is_named(http: httpx.Client) -> None:
    for model, salt in ((None, ""), ("fake", ""), ("other", "salted ")):
        said = {"model": model, "query": QUERY, "texts": DOCUMENTS[:1], "raw_scores": True}
        assert http.post("/rerank", json=said).json()[0]["score"] == score_of(salt + QUERY, DOCUMENTS[0])


@pytest.mark.parametrize("model", ["nobody/nothing", "/etc/passwd", "../fake", "~", "builtin"])
def test_an_unknown_model_is_404_and_looked_up_nowhere(http: httpx.Client, server: Running, model: str) -> None:
    words = f"model '{model}' is not served here; these are: fake, other, three, nan, rerank-v3.5"
    before = len(server.models)
    said = {"model": model, "query": QUERY, "documents": DOCUMENTS}
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        answer = http.post(path, json=said)
        assert (answer.status_code, words in answer.text) == (404, True)
    assert http.post("/rerank", json={**said, "texts": ["a"]}).json() == {"error": words, "error_type": "Validation"}
    assert http.get("/status", params={"model": model}).status_code == 404
    assert len(server.models) == before


TEI, OBJECT, V1, COHERE = "tei", "object", "v1", "cohere"
BODIES = {
    TEI: ("/rerank", {"query": QUERY, "texts": DOCUMENTS}),
    OBJECT: ("/rerank", {"query": QUERY, "documents": DOCUMENTS}),
    V1: ("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS}),
    COHERE: ("/v2/rerank", {"query": QUERY, "documents": DOCUMENTS}),
}


def message_of(dialect: str, body: Any) -> str:
    """The message of an error, in the place where that dialect's clients look for it."""
    if dialect == TEI:
        assert set(body) == {"error", "error_type"}
        return str(body["error"])
    if dialect == COHERE:
        return str(body["message"])
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if dialect == V1:
        assert body["message"] == error["message"]
    return str(error["message"])


@pytest.mark.parametrize("dialect", BODIES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": None}, "query: it is missing"),
        ({"query": 7}, "query: a string is needed, not int 7"),
        ({"texts": "a", "documents": "a"}, "a list of strings is needed, not str 'a'"),
        ({"texts": ["a", 7], "documents": ["a", 7]}, "number 1 is int 7"),
        ({"timeout": 0}, "timeout: a number greater than 0 is needed, not int 0"),
        ({"timeout": True}, "timeout: a number"),
        ({"priority": 1.5}, "priority: a whole number"),
        ({"on_timeout": "never"}, "on_timeout: 'raise' or 'partial' is needed"),
    ],
)
def test_a_mistake_is_named_in_the_words_of_the_dialect(
    http: httpx.Client, dialect: str, change: dict[str, Any], words: str
) -> None:
    path, body = BODIES[dialect]
    lists = {"texts", "documents"} - set(body)
    answer = http.post(path, json={**body, **{name: value for name, value in change.items() if name not in lists}})
    assert answer.status_code == (422 if dialect == TEI else 400)
    assert words in message_of(dialect, answer.json())


@pytest.mark.parametrize("dialect", BODIES)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"query": NaN}', b"1" * 5000, b"[]", b"null"]
)
def test_what_is_no_json_object_is_400(http: httpx.Client, dialect: str, content: bytes) -> None:
    answer = http.post(BODIES[dialect][0], content=content, headers={"content-type": "application/json"})
    assert answer.status_code in ((400, 422) if BODIES[dialect][0] == "/rerank" else (400,))
    assert "the body" in answer.text


@pytest.mark.parametrize("dialect", BODIES)
def test_a_form_is_not_taken_for_json(http: httpx.Client, dialect: str) -> None:
    answer = http.post(BODIES[dialect][0], data={"query": QUERY})
    assert answer.status_code == 415
    assert "application/json" in answer.text


def test_no_documents(http: httpx.Client) -> None:
    empty = http.post("/rerank", json={"query": QUERY, "texts": []})
    assert (empty.status_code, empty.json()["error_type"]) == (400, "Empty")
    assert http.post("/v2/rerank", json={"query": QUERY, "documents": []}).status_code == 400
    assert http.post("/rerank", json={"query": QUERY, "documents": []}).json()["results"] == []


def test_a_model_of_several_labels_scores_and_ranks_nothing(http: httpx.Client) -> None:
    said = {"model": "three", "query": QUERY, "documents": DOCUMENTS}
    assert "3 scores a pair" in http.post("/v2/rerank", json=said).json()["message"]
    scores = http.post("/pairs", json=said).json()["scores"]
    assert [len(labels) for labels in scores] == [3, 3, 3]


def test_what_is_not_a_number_is_an_error(http: httpx.Client) -> None:
    said = {"model": "nan", "query": QUERY, "documents": ["a", "!nan"]}
    for path in ("/rerank", "/pairs"):
        answer = http.post(path, json=said)
        assert (answer.status_code, "nan" in answer.json()["error"]["message"]) == (500, True)


def test_any_text_is_a_document(http: httpx.Client) -> None:
    texts = ["", "\0", "naïve", "文書", "🙂", "\ud800"]
    content = json.dumps({"query": "", "texts": texts, "raw_scores": True, "return_text": True})
    answer = http.post("/rerank", content=content, headers={"content-type": "application/json; charset=utf-8"}).json()
    assert {rank["text"]: rank["score"] for rank in answer} == {text: score_of("", text) for text in texts}


@pytest.mark.parametrize("dialect", BODIES)
def test_a_document_the_model_fails_on(http: httpx.Client, dialect: str) -> None:
    path, body = BODIES[dialect]
    name = "texts" if dialect == TEI else "documents"
    answer = http.post(path, json={**body, name: ["fine", "!raise too odd"]})
    assert answer.status_code == (424 if dialect == TEI else 500)
    assert "too odd" in message_of(dialect, answer.json())
    assert "Traceback" not in answer.text
    if dialect == TEI:
        assert answer.json()["error_type"] == "Backend"


def test_a_document_that_kills_its_workers() -> None:
    with serving({"fake": FAKE}, {"workers": 1}) as server, httpx.Client(base_url=server.url) as http:
        answer = http.post("/v2/rerank", json={"query": QUERY, "documents": ["fine", "!os._exit 3"]})
        assert answer.status_code == 500
        assert "document 1" in answer.json()["message"]
        assert http.post("/v2/rerank", json={"query": QUERY, "documents": ["fine"]}).status_code == 200


def test_what_the_server_is(http: httpx.Client) -> None:
    info = http.get("/info").json()
    assert info["model_id"] == "fake"
    assert info["model_type"] == {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
    for path in ("/models", "/v1/models"):
        assert [model["id"] for model in http.get(path).json()["data"]] == [
            "fake",
            "other",
            "three",
            "nan",
            "rerank-v3.5",
        ]
    assert http.get("/health").status_code == http.get("/ping").status_code == http.get("/ready").status_code == 200


def test_paths_and_methods_that_are_not_there(http: httpx.Client) -> None:
    missing = http.post("/v3/rerank", json={})
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFoundError")
    wrong = http.get("/v2/rerank")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "message" in wrong.json()
