"""Text, image, audio and file parts. The content parts of OpenAI's endpoints.

A part of a kind that is not known here has no price here, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import BadRequest, UnboundedCost
from gateway.pricing.cost_drivers import CostDrivers, object_of

TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text"))
IMAGE_PARTS = frozenset(("image_url", "input_image"))
FILE_PARTS = frozenset(("file", "input_file"))


def read_parts(parts: object, param: str, ask: CostDrivers) -> None:
    if parts is None or isinstance(parts, str):
        return
    if not isinstance(parts, list):
        raise BadRequest("`content` must be a string or a list of parts.", param=param)
    for part in parts:
        read_part(part, param, ask)


def read_part(part: object, param: str, ask: CostDrivers) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise BadRequest("Every content part must be an object with a `type`.", param=param)
    if kind in TEXT_PARTS:
        return
    if kind in IMAGE_PARTS:
        ask.images += 1
        _refuse_stored(part, part, param)
        image = part.get("image_url")
        ask.media_bytes += size_of(image.get("url") if isinstance(image, dict) else image, "data:image/")
    elif kind == "input_audio":
        ask.has_audio = True
        ask.media_bytes += size_of(object_of(part.get(kind), param).get("data"))
    elif kind in FILE_PARTS:
        ask.has_files = True
        file = object_of(part.get("file"), param)
        _refuse_stored(part, file, param)
        ask.media_bytes += size_of(part.get("file_data") or file.get("file_data"))
    else:
        raise unknown_kind(kind, param)


def _refuse_stored(part: Mapping[str, Any], within: Mapping[str, Any], param: str) -> None:
    """What an id stands for would lie in the operator's account, among every tenant's."""
    if part.get("file_id") is not None or within.get("file_id") is not None:
        raise BadRequest(
            "`file_id`: the gateway keeps no files. Send the file itself, in `file_data` or `image_url`.",
            param=param,
        )


def size_of(data: object, prefix: str = "") -> int:
    return len(data) if isinstance(data, str) and data.startswith(prefix) else 0


def unknown_kind(kind: Any, param: str) -> UnboundedCost:
    return UnboundedCost(f"No price is known for content of type {str(kind)[:40]!r}.", param=param)
