"""A deterministic tokenizer. A deterministic, plausible tokenizer that never counts more tokens than UTF-8
bytes.

Beside the text, a message adds at most 4 tokens and the reply's priming 3 (OpenAI's counting recipe); an
image adds 85 to 1105 (OpenAI's vision guide).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .wire import dumps

LONG_TEXT = 16_384
BYTES_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 3
TOKENS_PER_NAME = 1
TOKENS_PER_REPLY = 3
TOKENS_PER_TOOL = 3
TOKENS_PER_SEARCH = 160
IMAGE_TOKENS = {"low": 85, "high": 1105}
IMAGE_TOKENS_AUTO = 765
MEDIA_TOKENS = {"input_audio": 100, "file": 300, "input_video": 1000, "video_url": 1000}

_PIECE = re.compile(r" ?[A-Za-z]{1,7}| ?\d{1,3}| ?[^\w\s]|\s+|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the prompt counts: all its tokens, those marked with `cache_control`, and its media."""

    tokens: int = 0
    cacheable: int = 0
    images: int = 0

    def __add__(self, other: Prompt) -> Prompt:
        return Prompt(
            self.tokens + other.tokens, self.cacheable + other.cacheable, self.images + other.images
        )


def split(text: str) -> list[str]:
    """The text's tokens; joined they are the text."""
    return _PIECE.findall(text)


def count(text: str) -> int:
    """The number of tokens of a text; of a long one a quarter of its bytes, so that counting stays cheap."""
    return len(split(text)) if len(text) <= LONG_TEXT else len(text.encode()) // BYTES_PER_TOKEN


def count_prompt(body: Mapping[str, object]) -> Prompt:
    """Count messages (or a legacy `prompt`) and tools of a chat or text completion request."""
    total = Prompt()
    messages = body.get("messages")
    if isinstance(messages, list):
        for message in messages:
            total += _count_message(message)
        total += Prompt(TOKENS_PER_REPLY)
    elif "prompt" in body:
        total += _count_text_input(body["prompt"])
    tools = body.get("tools")
    for tool in tools if isinstance(tools, list) else []:
        total += Prompt(TOKENS_PER_TOOL + count(dumps(tool).decode()))
    return total


def count_inputs(inputs: object) -> list[int]:
    """Tokens of each input of an embeddings request: a text, texts, token ids or lists of token ids."""
    if isinstance(inputs, str):
        return [count(inputs)]
    if not isinstance(inputs, list):
        return []
    if all(isinstance(item, int) for item in inputs):
        return [len(inputs)] if inputs else []
    return [len(item) if isinstance(item, list) else _count_text_input(item).tokens for item in inputs]


def _count_text_input(value: object) -> Prompt:
    if isinstance(value, str):
        return Prompt(count(value))
    if isinstance(value, list):
        return sum(
            (Prompt(1) if isinstance(item, int) else _count_text_input(item) for item in value), Prompt()
        )
    if isinstance(value, dict) and isinstance(value.get("content"), list):
        return sum((_count_part(part) for part in value["content"]), Prompt())
    return Prompt()


def _count_message(message: object) -> Prompt:
    if not isinstance(message, dict):
        return Prompt()
    total = Prompt(TOKENS_PER_MESSAGE)
    if isinstance(message.get("name"), str):
        total += Prompt(TOKENS_PER_NAME + count(message["name"]))
    content = message.get("content")
    if isinstance(content, str):
        total += Prompt(count(content))
    elif isinstance(content, list):
        total += sum((_count_part(part) for part in content), Prompt())
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            total += Prompt(count(f"{function.get('name', '')}{function.get('arguments', '')}"))
    return total


def _count_part(part: object) -> Prompt:
    if not isinstance(part, dict):
        return Prompt()
    kind = part.get("type")
    if kind == "image_url":
        image = part.get("image_url")
        detail = image.get("detail") if isinstance(image, dict) else None
        return Prompt(IMAGE_TOKENS.get(str(detail), IMAGE_TOKENS_AUTO), images=1)
    if kind in MEDIA_TOKENS:
        return Prompt(MEDIA_TOKENS[kind])
    text = part.get("text")
    tokens = count(text) if isinstance(text, str) else 0
    return Prompt(tokens, cacheable=tokens if "cache_control" in part else 0)
