"""The content parts of OpenAI's endpoints: text, images, audio and files.

A part of a kind that is not known here has no price here, and must be refused.
"""

from __future__ import annotations

from common.errors import BadRequest, UnboundedCost
from common.json_types import Json, JsonObject
from gateway.pricing.cost_drivers import CostDrivers, object_of

TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text"))
IMAGE_PARTS = frozenset(("image_url", "input_image"))
FILE_PARTS = frozenset(("file", "input_file"))
NO_FILES = "`file_id`: the gateway keeps no files. Send the file itself, in `file_data` or `image_url`."


def read_parts(parts: Json, param: str, drivers: CostDrivers) -> None:
    """Reads a list of parts; a text is none. Raises BadRequest or UnboundedCost, which name `param`."""
    if parts is None or isinstance(parts, str):
        return
    if not isinstance(parts, list):
        raise BadRequest("`content` must be a string or a list of parts.", param=param)
    for part in parts:
        read_part(part, param, drivers)


def read_part(part: Json, param: str, drivers: CostDrivers) -> None:
    """Reads one part. Raises BadRequest or UnboundedCost, which name `param`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise BadRequest("Every content part must be an object with a `type`.", param=param)
    if kind in TEXT_PARTS:
        return
    if kind in IMAGE_PARTS:
        _read_image(part, param, drivers)
    elif kind == "input_audio":
        drivers.has_audio = True
        drivers.media_bytes += size_of(object_of(part.get(kind), param).get("data"))
    elif kind in FILE_PARTS:
        _read_file(part, param, drivers)
    else:
        raise unknown_kind(kind, param)


def _read_image(part: JsonObject, param: str, drivers: CostDrivers) -> None:
    drivers.images += 1
    _refuse_stored(part, part, param)
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    drivers.media_bytes += size_of(url, "data:image/")


def _read_file(part: JsonObject, param: str, drivers: CostDrivers) -> None:
    drivers.has_files = True
    file = object_of(part.get("file"), param)
    _refuse_stored(part, file, param)
    drivers.media_bytes += size_of(part.get("file_data") or file.get("file_data"))


def _refuse_stored(part: JsonObject, within: JsonObject, param: str) -> None:
    """Refuses an id: the file would be in the operator's account, among those of every tenant."""
    if part.get("file_id") is not None or within.get("file_id") is not None:
        raise BadRequest(NO_FILES, param=param)


def size_of(data: Json, prefix: str = "") -> int:
    """The bytes of a medium in the body, which are no text: 0 for a link to it."""
    return len(data) if isinstance(data, str) and data.startswith(prefix) else 0


def unknown_kind(kind: Json, param: str) -> UnboundedCost:
    """The error for a kind of content that has no price here."""
    return UnboundedCost(f"No price is known for content of type {str(kind)[:40]!r}.", param=param)
