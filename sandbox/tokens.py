"""A deterministic, plausible tokenizer. It must never count more tokens than the text has UTF-8 bytes.

Besides its text, a message adds 3 tokens, a name 1 and the reply 3, as in OpenAI's recipe:
https://github.com/openai/openai-cookbook/blob/main/examples/How_to_count_tokens_with_tiktoken.ipynb. An image
adds 85 to 1105 tokens (https://platform.openai.com/docs/guides/images-vision).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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

# Every character is part of exactly one piece, so that the pieces joined are the text again.
_PIECE = re.compile(r" ?[A-Za-z]{1,7}| ?\d{1,3}| ?[^\w\s]|\s+|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The counts of a prompt: all tokens, those marked with `cache_control`, and the images."""

    tokens: int = 0
    cacheable: int = 0
    images: int = 0

    def __add__(self, other: Prompt) -> Prompt:
        return Prompt(
            self.tokens + other.tokens, self.cacheable + other.cacheable, self.images + other.images
        )


def split(text: str) -> list[str]:
    """The text's tokens. Joined, they are the text."""
    return _PIECE.findall(text)


def count(text: str) -> int:
    """The number of tokens of a text. A long text counts as a quarter of its bytes, which is cheap."""
    return len(split(text)) if len(text) <= LONG_TEXT else len(text.encode()) // BYTES_PER_TOKEN


def count_prompt(body: Mapping[str, object]) -> Prompt:
    """Counts the messages (or the legacy `prompt`) and the tools of a chat or text completion request."""
    total = Prompt()
    messages = body.get("messages")
    if isinstance(messages, list):
        total += _sum(_count_message(message) for message in messages) + Prompt(TOKENS_PER_REPLY)
    elif "prompt" in body:
        total += _count_text_input(body["prompt"])
    tools = body.get("tools")
    for tool in tools if isinstance(tools, list) else []:
        # Providers put the tools into the prompt as text.
        total += Prompt(TOKENS_PER_TOOL + count(dumps(tool).decode()))
    return total


def _sum(prompts: Iterable[Prompt]) -> Prompt:
    return sum(prompts, Prompt())


def count_inputs(inputs: object) -> list[int]:
    """The tokens of each input of an embeddings request: a text, texts, token ids, or lists of token ids."""
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
        # A number is a token id.
        return _sum(Prompt(1) if isinstance(item, int) else _count_text_input(item) for item in value)
    if isinstance(value, dict) and isinstance(value.get("content"), list):
        return _sum(_count_part(part) for part in value["content"])
    return Prompt()


def _count_message(message: object) -> Prompt:
    if not isinstance(message, dict):
        return Prompt()
    total = Prompt(TOKENS_PER_MESSAGE)
    if isinstance(message.get("name"), str):
        total += Prompt(TOKENS_PER_NAME + count(message["name"]))
    return total + _count_content(message.get("content")) + _count_tool_calls(message.get("tool_calls"))


def _count_content(content: object) -> Prompt:
    if isinstance(content, list):
        return _sum(_count_part(part) for part in content)
    return Prompt(count(content)) if isinstance(content, str) else Prompt()


def _count_tool_calls(calls: object) -> Prompt:
    functions = [call.get("function") for call in _dicts(calls)]
    texts = [f"{item.get('name', '')}{item.get('arguments', '')}" for item in _dicts(functions)]
    return Prompt(sum(map(count, texts)))


def _dicts(value: object) -> list[dict[str, object]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


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
