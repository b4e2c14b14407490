"""The clients that people have, each as its users call it, against a server process."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from fakes import score_of
from serving import server_process

QUERY = "how do birds fly?"
DOCUMENTS = ["Bread is baked.", "Wings give lift.", "Water is wet."]
SCORES = [1 / (1 + math.exp(-score_of(QUERY, document))) for document in DOCUMENTS]
ORDER = sorted(range(3), key=lambda i: -SCORES[i])
KEY = "a-key"

pytestmark = pytest.mark.filterwarnings("ignore")  # the clients' own affair


def need(name: str) -> ModuleType:
    """The client ``name``, or a skip; under ``tox -e server`` each is there."""
    if os.environ.get("MP_RERANK_CLIENTS") == "required":
        return __import__(name)
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"clients {KEY}\n")
    with server_process(keys=str(keys)) as server:
        server.wait_for("(ready)")
        yield server.url


def approximately(scores: list[float]) -> Any:
    return pytest.approx(scores, abs=1e-6)


def best(count: int = 3) -> list[float]:
    return [SCORES[i] for i in ORDER[:count]]


def test_cohere_v2(url: str) -> None:
    cohere = need("cohere")
    client = cohere.ClientV2(KEY, base_url=url)
    answer = client.rerank(model="fake", query=QUERY, documents=DOCUMENTS, top_n=2)
    assert [result.index for result in answer.results] == ORDER[:2]
    assert [result.relevance_score for result in answer.results] == approximately(best(2))
    assert answer.meta.billed_units.search_units == 1


def test_cohere_v1_with_documents_that_are_objects(url: str) -> None:
    cohere = need("cohere")
    client = cohere.Client(KEY, base_url=url)
    documents = [{"text": document} for document in DOCUMENTS]
    answer = client.rerank(model="fake", query=QUERY, documents=documents, return_documents=True)
    assert [result.document.text for result in answer.results] == [DOCUMENTS[i] for i in ORDER]
    assert [result.relevance_score for result in answer.results] == approximately(best())


def test_coheres_errors(url: str) -> None:
    cohere = need("cohere")
    asked = {"query": QUERY, "documents": DOCUMENTS}
    with pytest.raises(cohere.errors.NotFoundError) as missing:
        cohere.ClientV2(KEY, base_url=url).rerank(model="rerank-v3.5", **asked)
    assert "'rerank-v3.5' is not served here" in missing.value.body["message"]
    with pytest.raises(cohere.errors.UnauthorizedError):
        cohere.ClientV2("another", base_url=url).rerank(model="fake", **asked)
    with pytest.raises(cohere.errors.BadRequestError) as empty:
        cohere.ClientV2(KEY, base_url=url).rerank(model="fake", query=QUERY, documents=[])
    assert "must not be empty" in empty.value.body["message"]


@pytest.mark.parametrize("provider", ["cohere", "infinity", "hosted_vllm", "jina_ai"])
def test_litellm(url: str, provider: str) -> None:
    litellm = need("litellm")
    asked: dict[str, Any] = {"query": QUERY, "documents": DOCUMENTS, "top_n": 2, "api_key": KEY}
    # Cohere's address is that of the call itself, the others' is the server's.
    base = f"{url}/v2/rerank" if provider == "cohere" else url
    answer = litellm.rerank(model=f"{provider}/fake", api_base=base, return_documents=False, **asked)
    assert [result["index"] for result in answer.results] == ORDER[:2]
    assert [result["relevance_score"] for result in answer.results] == approximately(best(2))
    with pytest.raises(litellm.AuthenticationError):
        litellm.rerank(model=f"{provider}/fake", api_base=base, **{**asked, "api_key": "another"})


@pytest.mark.parametrize("provider", ["hosted_vllm", "jina_ai"])
def test_litellm_gets_documents_back(url: str, provider: str) -> None:
    litellm = need("litellm")
    answer = litellm.rerank(
        model=f"{provider}/fake",
        api_base=url,
        query=QUERY,
        documents=DOCUMENTS,
        api_key=KEY,
        return_documents=True,
    )
    assert [result["document"]["text"] for result in answer.results] == [DOCUMENTS[i] for i in ORDER]


def test_langchain_cohere(url: str) -> None:
    langchain_cohere = need("langchain_cohere")
    from langchain_core.documents import Document

    reranker = langchain_cohere.CohereRerank(model="fake", cohere_api_key=KEY, base_url=url, top_n=2)
    documents = [Document(page_content=document) for document in DOCUMENTS]
    ranked = reranker.compress_documents(documents, QUERY)
    assert [document.page_content for document in ranked] == [DOCUMENTS[i] for i in ORDER[:2]]
    assert [document.metadata["relevance_score"] for document in ranked] == approximately(best(2))


def test_llama_index(url: str) -> None:
    need("llama_index.postprocessor.tei_rerank")
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    postprocessor = TextEmbeddingInference(top_n=2, base_url=url, auth_token=f"Bearer {KEY}")
    nodes = [NodeWithScore(node=TextNode(text=document)) for document in DOCUMENTS]
    ranked = postprocessor.postprocess_nodes(nodes, QueryBundle(QUERY))
    assert [node.node.get_content() for node in ranked] == [DOCUMENTS[i] for i in ORDER[:2]]
    assert [node.score for node in ranked] == approximately(best(2))


def test_haystack(url: str) -> None:
    need("haystack_integrations.components.rankers.huggingface_api")
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    ranker = HuggingFaceTEIRanker(url=url, top_k=2, token=Secret.from_token(KEY), raw_scores=True)
    ranked = ranker.run(QUERY, [Document(content=document) for document in DOCUMENTS])["documents"]
    assert [document.content for document in ranked] == [DOCUMENTS[i] for i in ORDER[:2]]
    logits = [score_of(QUERY, DOCUMENTS[i]) for i in ORDER[:2]]
    assert [document.score for document in ranked] == approximately(logits)


def test_open_webui(url: str) -> None:
    """Its call, field for field: the class itself comes with all of Open WebUI."""
    said = {"model": "fake", "query": QUERY, "documents": DOCUMENTS, "top_n": len(DOCUMENTS)}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    for path in ("/v1/rerank", "/rerank"):
        data = httpx.post(f"{url}{path}", headers=headers, json=said).json()
        in_order = sorted(data["results"], key=lambda result: result["index"])
        assert [result["relevance_score"] for result in in_order] == approximately(SCORES)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(url: str) -> None:
    command = ["curl", "-sS", "--fail-with-body", f"{url}/rerank", "-H", "Content-Type: application/json"]
    body = json.dumps({"query": QUERY, "texts": DOCUMENTS, "return_text": True})
    done = subprocess.run([*command, "-H", f"Authorization: Bearer {KEY}", "-d", body], capture_output=True, check=True)
    assert [rank["text"] for rank in json.loads(done.stdout)] == [DOCUMENTS[i] for i in ORDER]
    refused = subprocess.run([*command, "-d", body], capture_output=True)
    assert refused.returncode == 22
    assert json.loads(refused.stdout)["error_type"] == "Validation"


def test_schemathesis_finds_nothing(url: str, tmp_path: Path) -> None:
    """What the OpenAPI document says is so: for what it allows, for what it does not, and for every answer."""
    need("schemathesis")
    options = "--phases examples,coverage --workers 2 --seed 1 --no-color --generation-database none"
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("--config-file", str(Path(__file__).with_name("schemathesis.toml"))),
        *("run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {KEY}"),
        *(*options.split(), "--checks", "all", "--exclude-checks", "positive_data_acceptance"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
