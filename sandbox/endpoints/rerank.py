"""/rerank. The documents by the words that they share with the query, billed by search unit or by token.

A search unit is one query with up to 100 documents; a document of more than 500 tokens counts as several
(https://cohere.com/pricing). Shape: OpenRouter's API reference, rerank.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

from sandbox.failures import refusal
from sandbox.models.pricing import Tokens
from sandbox.planning import Ask, Body, Plan, plan_media
from sandbox.tokens import count

from .dialect import Whole
from .usage import render_cost

MAX_DOCUMENTS = 1_000
DOCUMENTS_PER_UNIT = 100
TOKENS_PER_PIECE = 500
_WORD = re.compile(r"\w+")


def answer_rerank(body: Body, ask: Ask) -> tuple[Plan, Rerank]:
    """Plan a ranking; raises Refusal."""
    query, documents = body.get("query"), body.get("documents")
    if not isinstance(query, str) or not query:
        raise refusal(400, "query: Invalid input: expected string", error_type="invalid_request")
    if not isinstance(documents, list) or not 1 <= len(documents) <= MAX_DOCUMENTS:
        raise refusal(
            400, f"documents: expected 1 to {MAX_DOCUMENTS} documents", error_type="invalid_request"
        )
    shown = [_document(document, place) for place, document in enumerate(documents)]
    wanted = body.get("top_n")
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1):
        raise refusal(400, "top_n must be at least 1", error_type="invalid_request")
    tokens = _tokens(query, shown)
    plan = plan_media(body, ask, "rerank", "rerank", lambda route: tokens)
    return plan, Rerank(query, shown, len(shown) if wanted is None else int(wanted), ask.limits.answer_bytes)


class Rerank(Whole):
    """`/rerank`."""

    def __init__(
        self, query: str, documents: list[Mapping[str, object]], wanted: int, most_bytes: int | None
    ) -> None:
        self._query = query
        self._documents = documents
        self._wanted = wanted
        self._most_bytes = most_bytes

    def render(self, plan: Plan) -> Mapping[str, object]:
        scores = [
            (score(self._query, _text(document)), -place) for place, document in enumerate(self._documents)
        ]
        best = [(mark, -place) for mark, place in sorted(scores, reverse=True)[: self._wanted]]
        results = [
            {"index": place, "relevance_score": mark, "document": self._documents[place]}
            for mark, place in best
        ]
        body = {
            "id": plan.id,
            "model": plan.model.id,
            "provider": plan.route.endpoint.provider,
            "results": self._fitting(results),
        }
        return body if plan.behaviour.usage == "missing" else {**body, "usage": _usage(plan)}

    def _fitting(self, results: list[dict[str, object]]) -> list[dict[str, object]]:
        """The best results, as many as the size of answers allows."""
        if self._most_bytes is None:
            return results
        kept, size = [], 0
        for result in results:
            size += len(str(result["document"]).encode())
            if size > self._most_bytes:
                break
            kept.append(result)
        return kept


def _usage(plan: Plan) -> dict[str, object]:
    tokens = plan.tokens
    units = (
        {"search_units": 0 if plan.behaviour.cache == "hit" else tokens.units}
        if plan.route.prices.request
        else {}
    )
    return {**units, "total_tokens": tokens.prompt, **render_cost(plan, tokens)}


def _tokens(query: str, documents: list[Mapping[str, object]]) -> Tokens:
    asked = count(query)
    lengths = [count(_text(document)) for document in documents]
    pieces = sum(max(1, -(-length // TOKENS_PER_PIECE)) for length in lengths)
    return Tokens(prompt=asked + sum(lengths), units=-(-pieces // DOCUMENTS_PER_UNIT))


def score(query: str, document: str) -> float:
    """Between 0 and 1: the share of the query's words that the document has, and a little of its own."""
    wanted, found = (set(_WORD.findall(text.lower())) for text in (query, document))
    shared = len(wanted & found) / len(wanted) if wanted else 0.0
    return round(0.9 * shared + zlib.crc32(document.encode()) % 1000 / 20_000, 6)


def _document(document: object, place: int) -> Mapping[str, object]:
    if isinstance(document, str):
        return {"text": document}
    if isinstance(document, Mapping) and isinstance(document.get("text"), str):
        return document
    raise refusal(
        400, f"documents.{place}: expected a string, or an object with text", error_type="invalid_request"
    )


def _text(document: Mapping[str, object]) -> str:
    return str(document["text"])
