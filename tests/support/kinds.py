"""The billable endpoints, each with bodies that it takes: for tests that go through all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WORDS = ("all", "that", "glitters", "is", "not", "gold", "ça", "日本")


@dataclass(frozen=True, slots=True)
class Kind:
    """One endpoint. `body` makes a body for it, at random; `asks` is what the upstream is asked for it."""

    path: str
    body: Callable[[random.Random], dict[str, Any]]
    streams: bool = True
    form: bool = False
    asks: str = ""
    tells: bool = True  # the answer has room for what was charged, once it has begun

    @property
    def url(self) -> str:
        return f"/v1/{self.path}"

    @property
    def upstream_path(self) -> str:
        return f"/{self.asks or self.path}"

    def content(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body as httpx's arguments."""
        if not self.form:
            return {"json": body}
        fields = {name: str(value) for name, value in body.items() if name != "file"}
        return {"data": fields, "files": {"file": ("speech.wav", body["file"], "audio/wav")}}


def text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 40)))


def _limited(rng: random.Random, body: dict[str, Any], field: str = "max_tokens") -> dict[str, Any]:
    return {**body, field: rng.randint(16, 400)} if rng.random() < 0.7 else body


def _chat(rng: random.Random) -> dict[str, Any]:
    models = ("openai/gpt-4o-mini", "anthropic/claude-sonnet-4.5", "sandbox/fixed-price")
    body: dict[str, Any] = {"model": rng.choice(models), "messages": [{"role": "user", "content": text(rng)}]}
    if rng.random() < 0.2:
        body["models"] = ["openai/gpt-4o-mini", "anthropic/claude-haiku-4.5"]
    return _limited(rng, body)


def _completion(rng: random.Random) -> dict[str, Any]:
    return _limited(rng, {"model": "openai/gpt-4o-mini", "prompt": text(rng)})


def _embedding(rng: random.Random) -> dict[str, Any]:
    return {"model": "openai/text-embedding-3-small", "input": [text(rng) for _ in range(rng.randint(1, 3))]}


def _response(rng: random.Random) -> dict[str, Any]:
    return _limited(rng, {"model": "openai/gpt-4o-mini", "input": text(rng)}, "max_output_tokens")


def _message(rng: random.Random) -> dict[str, Any]:
    body = {"model": "anthropic/claude-sonnet-4.5", "messages": [{"role": "user", "content": text(rng)}]}
    return {**body, "max_tokens": rng.randint(16, 400)}


def _rerank(rng: random.Random) -> dict[str, Any]:
    return {
        "model": "cohere/rerank-v3.5",
        "query": text(rng),
        "documents": [text(rng) for _ in range(rng.randint(1, 5))],
    }


def _image(rng: random.Random) -> dict[str, Any]:
    return {"model": "google/gemini-2.5-flash-image", "prompt": text(rng), "n": rng.randint(1, 2)}


def _speech(rng: random.Random) -> dict[str, Any]:
    return {"model": "openai/gpt-4o-mini-tts", "input": text(rng), "voice": "alloy"}


def _transcription(rng: random.Random) -> dict[str, Any]:
    return {"model": "openai/gpt-4o-transcribe", "file": b"RIFF" + rng.randbytes(rng.randint(100, 2000))}


KINDS = (
    Kind("chat/completions", _chat),
    Kind("completions", _completion),
    Kind("responses", _response),
    Kind("messages", _message),
    Kind("embeddings", _embedding, streams=False),
    Kind("rerank", _rerank, streams=False),
    Kind("images", _image, streams=False),
    Kind("images/generations", _image, streams=False, asks="images"),
    Kind("audio/speech", _speech, streams=False, tells=False),
    Kind("audio/transcriptions", _transcription, streams=False, form=True),
)
