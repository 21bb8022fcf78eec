"""The bodies of /images, /audio/speech, /audio/transcriptions and /rerank.

These endpoints take no tools and no plugins, and most take no price caps: their bounds rest on the prices of
the model list.
"""

from __future__ import annotations

import re

from common.errors import BadRequest, UnboundedCost
from common.json_types import Json, JsonObject
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
    require_list,
    text_of,
    wrong,
)
from gateway.pricing.readers.content_parts import IMAGE_PARTS, read_part, size_of, unknown_kind

MAX_IMAGES = 10
MAX_REFERENCES = 16
SMALL_SIZES = frozenset(("512", "1k", "2k", "auto"))
PIXELS = re.compile(r"(\d{1,5})x(\d{1,5})")

# A search unit is a query with up to 100 documents. A document longer than 500 tokens together with the query
# counts as several. A query of more than 256 tokens used to be cut, and is counted in full. Source:
# https://cohere.com/pricing, https://docs.cohere.com/docs/rerank
UNIT_DOCUMENTS = 100
CHUNK_TOKENS = 500 - 256

# A provider has a minute for a recording (https://openrouter.ai/docs/guides/overview/multimodal/stt). None is
# known to get through a day of silence in it, however few bytes that may take.
MAX_SECONDS = 86_400
# Providers that bill by the second may count at least 10 or 15 of them, or begun minutes.
BILLED_SECONDS = 60


def read_rerank(body: JsonObject, drivers: CostDrivers) -> None:
    """/rerank: the query is billed with every piece of every document."""
    drivers.has_output = drivers.is_text = False
    query = text_of(body, "query")
    integer(body, "top_n")
    documents = require_list(body, "documents", "document")
    for document in documents:
        _read_document(document)
    chunks = len(documents) + (drivers.raw_size + len(documents) * _bytes(query)) // CHUNK_TOKENS
    drivers.requests = -(-chunks // UNIT_DOCUMENTS)
    drivers.allowance += chunks * (_bytes(query) + MESSAGE_TOKENS)  # the query is read along with every chunk


def _read_document(document: Json) -> None:
    if isinstance(document, dict) and document.get("image") is not None:
        raise UnboundedCost("No price is known for images among the documents.", param="documents")
    text = document.get("text") if isinstance(document, dict) else document
    if not isinstance(text, str):
        raise wrong("documents", "a list of strings, or of objects with a `text`")


def read_image(body: JsonObject, drivers: CostDrivers) -> None:
    """/images: how many, how large, and after which references."""
    drivers.limit_names, drivers.is_text = (), False
    text_of(body, "prompt")
    drivers.modalities = frozenset(("text", "image"))
    drivers.choices = drivers.requests = drivers.made_images = integer(body, "n", MAX_IMAGES) or 1
    drivers.image_tokens = max(_image_tokens(body, "size"), _image_tokens(body, "resolution"))
    references = _references(body)
    refuse_foreign(body, "image", "images", "mask", "image_config")
    for reference in references:
        _read_reference(reference, drivers)


def _references(body: JsonObject) -> list[Json]:
    references = list_of(body, "input_references")
    if len(references) > MAX_REFERENCES:
        raise wrong("input_references", f"a list of at most {MAX_REFERENCES} images")
    return references


def _read_reference(reference: Json, drivers: CostDrivers) -> None:
    kind = reference.get("type") if isinstance(reference, dict) else reference
    if not isinstance(kind, str) or kind not in IMAGE_PARTS or not isinstance(reference, dict):
        raise unknown_kind(kind, "input_references")
    read_part(reference, "input_references", drivers)


def _image_tokens(body: JsonObject, param: str) -> int:
    """The output tokens of an image of this size, which is a tier ("2K") or pixels ("1024x1024")."""
    size = body.get(param)
    if size is None:
        return IMAGE_OUTPUT_TOKENS
    if not isinstance(size, str):
        raise wrong(param, "a string")
    if size.lower() in SMALL_SIZES:
        return IMAGE_OUTPUT_TOKENS
    if match := PIXELS.fullmatch(size):
        megapixels = -(-int(match[1]) * int(match[2]) // 1_000_000)
        return max(IMAGE_OUTPUT_TOKENS, megapixels * TOKENS_PER_MEGAPIXEL)
    return LARGE_IMAGE_OUTPUT_TOKENS


def read_speech(body: JsonObject, drivers: CostDrivers) -> None:
    """/audio/speech: the text; how long it takes to say is the model's to know."""
    drivers.limit_names, drivers.is_text = (), False
    text_of(body, "input")
    drivers.modalities = frozenset(("audio",))
    if list_of(body, "input_references"):
        raise UnboundedCost("No price is known for voices to clone.", param="input_references")


def read_transcription(body: JsonObject, drivers: CostDrivers) -> None:
    """/audio/transcriptions: a JSON body with `input_audio`, or the text fields of a form. The values of a
    form are strings, and its file is not among them.
    """
    drivers.limit_names, drivers.is_text = (), False
    drivers.modalities = frozenset(("text",))
    drivers.has_audio = True
    drivers.least_input = MAX_SECONDS if drivers.seconds is None else _billed_seconds(drivers.seconds)
    audio = body.get("input_audio")
    drivers.takes_provider = audio is not None
    drivers.media_bytes = _file_bytes(body, drivers.raw_size) if audio is None else _audio_bytes(audio)
    if body.get("stream") not in (None, False, "false"):
        raise BadRequest("Transcriptions are not streamed.", param="stream")


def _billed_seconds(seconds: int) -> int:
    return -(-max(1, seconds) // BILLED_SECONDS) * BILLED_SECONDS


def _file_bytes(fields: JsonObject, raw_size: int) -> int:
    """The bytes of a form that are not the text of its fields."""
    return max(0, raw_size - sum(_bytes(value) for value in fields.values() if isinstance(value, str)))


def _audio_bytes(audio: Json) -> int:
    data = audio.get("data") if isinstance(audio, dict) else None
    if not isinstance(data, str):
        raise wrong("input_audio", "an object with the recording in `data`")
    return size_of(data)


def refuse_extras(body: JsonObject, suffixes: set[str]) -> None:
    """Refuses what only the endpoints for text take."""
    refuse_foreign(body, "messages", "tools", "functions", "plugins")
    if "online" in suffixes:
        raise UnboundedCost("Only endpoints for text can search the web.", param="model")
    if object_of(body.get("provider"), "provider").get("options") is not None:
        message = "Options for one provider can change what is made and billed."
        raise UnboundedCost(message, param="provider.options")


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
