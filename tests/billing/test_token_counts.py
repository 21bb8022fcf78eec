"""The tokens that count towards the limits are those that the answer of an endpoint names."""

from __future__ import annotations

from tests.support.gateway import Gateway


async def test_an_embedding_counts_its_prompt(gateway: Gateway) -> None:
    user = await gateway.register(credits=1)
    body = {"model": "openai/text-embedding-3-small", "input": "hello world " * 100}
    response = await gateway.http.post("/v1/embeddings", headers=user.headers, json=body)
    limit = (await gateway.http.get("/user/limit", headers=user.headers)).json()
    assert limit["current_usage"]["tokens_per_minute"] == response.json()["usage"]["total_tokens"] > 100
