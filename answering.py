"""What does a whole answer say, and what of it may the client see? JSON in, the same bytes out unless something must be hidden."""

from __future__ import annotations

from dialects import Dialect, Said
from ending import Ending
from errors import UpstreamError
from events import BOM
from upstream_errors import error_of, error_status, sanitised_error
from usage import parse_json, read_generation_id


def read_answer(raw: bytes, dialect: Dialect, ending: Ending, *, invented: bool, own_key: bool = False) -> bytes:
    """The answer as the client gets it; notes in `ending` what it says of itself.

    Raises UpstreamError for what is no JSON object, and the GatewayError that an error in it means.
    """
    raw = raw.removeprefix(BOM)
    try:
        data = parse_json(raw)
    except ValueError:
        raise UpstreamError("The model provider's answer is not JSON.") from None
    if not isinstance(data, dict):
        raise UpstreamError("The model provider's answer is not a JSON object.")
    said = Said()
    dialect.read(data, said, sanitised_error)
    ending.learn(said)
    ending.generation_id = ending.generation_id or read_generation_id(data.get("id"))
    if dialect.is_error(data):
        error = data.get("error")
        about = {"error": dialect.error_of(error)} if isinstance(error, dict) else data
        raise error_of(error_status(about) or 502, {}, raw, invented=invented, own_key=own_key)
    ending.completed = not dialect.has_failed(said)
    return dialect.without_secrets(raw, sanitised_error)
