"""`/rerank`: ranks documents by the words that they share with the query. Billed by search unit or by token.

A search unit is one query with up to 100 documents, and a document of more than 500 tokens counts as several
(https://cohere.com/pricing). The shape is that of OpenRouter's API reference.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from itertools import accumulate

from sandbox.failures import invalid_request
from sandbox.models.pricing import Tokens
from sandbox.planning import Body, Plan, RequestSettings, plan_media
from sandbox.request_fields import require_positive
from sandbox.tokens import count

from .dialect import JsonDialect
from .usage import render_cost

MAX_DOCUMENTS = 1_000
DOCUMENTS_PER_UNIT = 100
TOKENS_PER_PIECE = 500
_WORD = re.compile(r"\w+")


def plan_rerank(body: Body, settings: RequestSettings) -> tuple[Plan, Rerank]:
    """Plans a ranking; raises Refusal."""
    query = body.get("query")
    if not isinstance(query, str) or not query:
        raise invalid_request("query: Invalid input: expected string")
    documents, top_n = _require_documents(body), body.get("top_n")
    limit = len(documents) if top_n is None else require_positive(top_n, "top_n must be at least 1")
    tokens = _tokens(query, documents)
    plan = plan_media(body, settings, "rerank", "rerank", lambda route: tokens)
    return plan, Rerank(query, documents, limit, settings.limits.answer_bytes)


class Rerank(JsonDialect):
    """`/rerank`."""

    def __init__(
        self, query: str, documents: list[Mapping[str, object]], limit: int, max_bytes: int | None
    ) -> None:
        self._query = query
        self._documents = documents
        self._limit = limit
        self._max_bytes = max_bytes

    def render(self, plan: Plan) -> Mapping[str, object]:
        body = {
            "id": plan.id,
            "model": plan.model.id,
            "provider": plan.route.endpoint.provider,
            "results": self._within_limit(self._results()),
        }
        return body if plan.behaviour.usage == "missing" else {**body, "usage": _usage(plan)}

    def _results(self) -> list[dict[str, object]]:
        """The best documents, the best first; of equal ones, the earlier first."""
        scores = [score(self._query, _text(document)) for document in self._documents]
        best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: self._limit]
        return [
            {"index": index, "relevance_score": scores[index], "document": self._documents[index]}
            for index in best
        ]

    def _within_limit(self, results: list[dict[str, object]]) -> list[dict[str, object]]:
        """The best results, as many as the limit of a response's size allows."""
        if self._max_bytes is None:
            return results
        sizes = accumulate(len(str(result["document"]).encode()) for result in results)
        return results[: sum(size <= self._max_bytes for size in sizes)]


def _usage(plan: Plan) -> dict[str, object]:
    tokens, units = plan.tokens, {}
    # Only models with a price per request report search units.
    if plan.route.prices.request:
        units = {"search_units": 0 if plan.behaviour.cache == "hit" else tokens.units}
    return {**units, "total_tokens": tokens.prompt, **render_cost(plan, tokens)}


def _tokens(query: str, documents: list[Mapping[str, object]]) -> Tokens:
    lengths = [count(_text(document)) for document in documents]
    pieces = sum(max(1, -(-length // TOKENS_PER_PIECE)) for length in lengths)
    return Tokens(prompt=count(query) + sum(lengths), units=-(-pieces // DOCUMENTS_PER_UNIT))


def score(query: str, document: str) -> float:
    """Between 0 and 1: the share of the query's words that the document has.

    A little of the document's own checksum is added, so that hardly any two documents have the same score.
    """
    query_words, words = (set(_WORD.findall(text.lower())) for text in (query, document))
    shared = len(query_words & words) / len(query_words) if query_words else 0.0
    return round(0.9 * shared + zlib.crc32(document.encode()) % 1000 / 20_000, 6)


def _require_documents(body: Body) -> list[Mapping[str, object]]:
    documents = body.get("documents")
    if not isinstance(documents, list) or not 1 <= len(documents) <= MAX_DOCUMENTS:
        raise invalid_request(f"documents: expected 1 to {MAX_DOCUMENTS} documents")
    return [_document(document, index) for index, document in enumerate(documents)]


def _document(document: object, index: int) -> Mapping[str, object]:
    if isinstance(document, str):
        return {"text": document}
    if isinstance(document, Mapping) and isinstance(document.get("text"), str):
        return document
    raise invalid_request(f"documents.{index}: expected a string, or an object with text")


def _text(document: Mapping[str, object]) -> str:
    return str(document["text"])
