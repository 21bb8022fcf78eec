"""Images, speech, transcription, rerank. /rerank, /images, /audio/speech, /audio/transcriptions.

These endpoints take no tools and no plugins, and most take no price caps: their bounds rest on the prices of
the model list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from common.errors import BadRequest, UnboundedCost
from gateway.pricing.cost_drivers import (
    IMAGE_OUTPUT_TOKENS,
    LARGE_IMAGE_OUTPUT_TOKENS,
    MESSAGE_TOKENS,
    TOKENS_PER_MEGAPIXEL,
    CostDrivers,
    integer,
    list_of,
    object_of,
    refuse_foreign,
    text_of,
    wrong,
)
from gateway.pricing.readers.content_parts import IMAGE_PARTS, read_part, size_of, unknown_kind

MAX_IMAGES = 10
MAX_REFERENCES = 16
SMALL_SIZES = frozenset(("512", "1k", "2k", "auto"))
PIXELS = re.compile(r"(\d{1,5})x(\d{1,5})")

# A search unit is a query with up to 100 documents; a document longer than 500 tokens together with the query
# counts as several; a query of more than 256 tokens used to be cut, and is counted in full. Source:
# https://cohere.com/pricing, https://docs.cohere.com/docs/rerank
UNIT_DOCUMENTS = 100
CHUNK_TOKENS = 500 - 256

# A provider has a minute for a recording (https://openrouter.ai/docs/guides/overview/multimodal/stt): in it,
# none is known to get through a day of silence, however few bytes that may take.
MAX_SECONDS = 86_400
# Those who bill by the second may count at least 10 or 15 of them, or begun minutes.
BILLED_SECONDS = 60


def read_rerank(body: Mapping[str, Any], ask: CostDrivers) -> None:
    ask.has_output = ask.is_text = False
    query = text_of(body, "query")
    integer(body, "top_n")
    documents = list_of(body, "documents")
    if not documents:
        raise wrong("documents", "a list of at least one document")
    for document in documents:
        _read_document(document)
    chunks = len(documents) + (ask.raw_size + len(documents) * _bytes(query)) // CHUNK_TOKENS
    ask.requests = -(-chunks // UNIT_DOCUMENTS)
    ask.allowance += chunks * (_bytes(query) + MESSAGE_TOKENS)  # the query is read along with every chunk


def _read_document(document: object) -> None:
    if isinstance(document, dict):
        if document.get("image") is not None:
            raise UnboundedCost("No price is known for images among the documents.", param="documents")
        document = document.get("text")
    if not isinstance(document, str):
        raise wrong("documents", "a list of strings, or of objects with a `text`")


def read_image(body: Mapping[str, Any], ask: CostDrivers) -> None:
    ask.limit_names, ask.is_text = (), False
    text_of(body, "prompt")
    ask.modalities = frozenset(("text", "image"))
    ask.choices = ask.requests = ask.made_images = integer(body, "n", MAX_IMAGES) or 1
    ask.image_tokens = max(_image_tokens(body, "size"), _image_tokens(body, "resolution"))
    references = list_of(body, "input_references")
    if len(references) > MAX_REFERENCES:
        raise wrong("input_references", f"a list of at most {MAX_REFERENCES} images")
    refuse_foreign(body, "image", "images", "mask", "image_config")
    for part in references:
        if not isinstance(part, dict) or part.get("type") not in IMAGE_PARTS:
            raise unknown_kind(part.get("type") if isinstance(part, dict) else part, "input_references")
        read_part(part, "input_references", ask)


def _image_tokens(body: Mapping[str, Any], param: str) -> int:
    """The output tokens of an image of this size: a tier, or pixels."""
    size = body.get(param)
    if size is None:
        return IMAGE_OUTPUT_TOKENS
    if not isinstance(size, str):
        raise wrong(param, "a string")
    if size.lower() in SMALL_SIZES:
        return IMAGE_OUTPUT_TOKENS
    if found := PIXELS.fullmatch(size):
        megapixels = -(-int(found[1]) * int(found[2]) // 1_000_000)
        return max(IMAGE_OUTPUT_TOKENS, megapixels * TOKENS_PER_MEGAPIXEL)
    return LARGE_IMAGE_OUTPUT_TOKENS


def read_speech(body: Mapping[str, Any], ask: CostDrivers) -> None:
    ask.limit_names, ask.is_text = (), False
    text_of(body, "input")
    ask.modalities = frozenset(("audio",))
    if list_of(body, "input_references"):
        raise UnboundedCost("No price is known for voices to clone.", param="input_references")


def read_transcription(body: Mapping[str, Any], ask: CostDrivers) -> None:
    """A JSON body with `input_audio`, or the text fields of a form: its values are strings, and its file is
    not among them.
    """
    ask.limit_names, ask.is_text = (), False
    ask.modalities = frozenset(("text",))
    ask.has_audio = True
    ask.least_input = (
        MAX_SECONDS if ask.seconds is None else -(-max(1, ask.seconds) // BILLED_SECONDS) * BILLED_SECONDS
    )
    audio = body.get("input_audio")
    ask.takes_provider = audio is not None
    if audio is None:
        ask.media_bytes = ask.raw_size - min(
            ask.raw_size, sum(_bytes(value) for value in body.values() if isinstance(value, str))
        )
    elif not isinstance(audio, dict) or not isinstance(audio.get("data"), str):
        raise wrong("input_audio", "an object with the recording in `data`")
    else:
        ask.media_bytes = size_of(audio["data"])
    if body.get("stream") not in (None, False, "false"):
        raise BadRequest("Transcriptions are not streamed.", param="stream")


def refuse_extras(body: Mapping[str, Any], suffixes: set[str]) -> None:
    """What the endpoints for text have and these have not."""
    refuse_foreign(body, "messages", "tools", "functions", "plugins")
    if "online" in suffixes:
        raise UnboundedCost("Only endpoints for text can search the web.", param="model")
    if object_of(body.get("provider"), "provider").get("options") is not None:
        raise UnboundedCost(
            "Options for one provider can change what is made and billed.", param="provider.options"
        )


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
