"""Whatever a field of a body holds, there is an answer: a simulator that broke off would look like a provider
that does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.sandbox_client import Client

NONSENSE: list[Any] = [None, True, 0, -1, 1.5, "x", "", [], {}, [[]], [{}], {"a": 1}, [1], ["x"], 10**30]
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
TALK = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000}
BODIES: dict[str, dict[str, Any]] = {
    "/chat/completions": {
        **TALK,
        "model": "openai/gpt-4o-mini",
        "models": ["openai/gpt-4o-mini"],
        "stream": False,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "response_format": SCHEMA,
        "n": 1,
        "reasoning": {"effort": "low"},
        "provider": {"max_price": {"prompt": 1}},
        "plugins": [{"id": "web"}],
        "stream_options": {"include_usage": True},
        "stop": "x",
        "user": "u",
    },
    "/completions": {"model": "openai/gpt-4o-mini", "prompt": "Hi", "max_tokens": 10},
    "/embeddings": {
        "model": "openai/text-embedding-3-small",
        "input": "Hi",
        "encoding_format": "float",
        "dimensions": 5,
    },
    "/responses": {
        "model": "openai/gpt-4o-mini",
        "input": "Hi",
        "max_output_tokens": 20,
        "text": {"format": {"type": "text"}},
        "tools": [{"type": "function", **FUNCTION}],
        "reasoning": {"effort": "low"},
        "instructions": "x",
    },
    "/messages": {
        **TALK,
        "model": "anthropic/claude-haiku-4.5",
        "system": "x",
        "tools": [{"name": "f", "input_schema": {}}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "tool_choice": {"type": "auto"},
    },
    "/rerank": {"model": "cohere/rerank-v3.5", "query": "x", "documents": ["a", "b"], "top_n": 1},
    "/images": {
        "model": "openai/gpt-5-image-mini",
        "prompt": "x",
        "n": 1,
        "size": "1024x1024",
        "quality": "low",
    },
    "/audio/speech": {
        "model": "openai/gpt-4o-mini-tts",
        "input": "x",
        "voice": "alloy",
        "response_format": "mp3",
        "speed": 1,
    },
    "/audio/transcriptions": {
        "model": "openai/whisper-1",
        "input_audio": {"data": "AAAA", "format": "mp3"},
        "response_format": "json",
        "language": "en",
        "prompt": "x",
    },
}


def spoilt(value: Any) -> Iterator[Any]:
    """The value with nonsense in one of its places, and nonsense instead of it."""
    yield from NONSENSE
    if isinstance(value, dict):
        for name, part in value.items():
            yield from ({**value, name: each} for each in spoilt(part))
    elif isinstance(value, list) and value:
        yield from ([each, *value[1:]] for each in spoilt(value[0]))


@pytest.mark.parametrize("path", BODIES)
async def test_nonsense_is_answered(client: Client, path: str) -> None:
    body = BODIES[path]
    statuses = set()
    for name, value in body.items():
        for each in spoilt(value):
            statuses.add(
                (
                    await client.http.post(
                        path, json={**body, name: each}, headers={"authorization": "Bearer any"}
                    )
                ).status_code
            )
    assert 200 in statuses and 400 in statuses and max(statuses) < 500
