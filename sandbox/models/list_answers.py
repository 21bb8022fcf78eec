"""/models and /models/{id}/endpoints. OpenRouter's shapes, made from the model table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal

from sandbox.wire import plain

from .entry import Endpoint, Model
from .pricing import ONE
from .text_models import MODELS

MAX_PAGE = 1000
_UNPRICED = frozenset({"discount", "min_prompt_tokens", "overrides"})


def list_models(
    query: Mapping[str, str], factor_of: Decimal | Callable[[str], Decimal]
) -> list[dict[str, object]]:
    """The models that the query asks for (text output unless it says otherwise), prices times a factor for
    all or for each id.
    """
    wanted = set(query.get("output_modalities", "text").split(","))
    parameters = [name for name in query.get("supported_parameters", "").split(",") if name]
    words = query.get("q", "").lower()
    found = [
        render_model(model, factor_of if isinstance(factor_of, Decimal) else factor_of(model.id))
        for model in MODELS
        if ("all" in wanted or wanted & set(model.outputs))
        and all(model.supports(name) for name in parameters)
        and words in f"{model.id} {model.name}".lower()
    ]
    offset, limit = _number(query, "offset", 0), _number(query, "limit", MAX_PAGE)
    return found[offset : offset + min(limit, MAX_PAGE)]


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name, "")
    return int(text) if text.isdecimal() else default


def render_model(model: Model, factor: Decimal) -> dict[str, object]:
    """One entry of `/models`."""
    return {
        "id": model.id,
        "canonical_slug": model.slug or model.id,
        "hugging_face_id": None,
        "name": model.name,
        "created": model.created,
        "description": f"{model.name}, simulated: its answers are made up, its prices and shapes are real.",
        "context_length": model.context,
        "architecture": _architecture(model),
        "pricing": scale(model.endpoints[0].pricing, factor),
        "top_provider": {
            "context_length": model.context,
            "max_completion_tokens": model.max_completion,
            "is_moderated": model.style == "openai" and model.id.startswith("openai/"),
        },
        "per_request_limits": None,
        "supported_parameters": list(model.parameters),
        "default_parameters": None,
        "supported_voices": list(model.voices) or None,
        "expiration_date": None,
        "knowledge_cutoff": None,
        "links": {"details": f"/api/v1/models/{model.id}/endpoints"},
        **({"reasoning": _reasoning(model)} if model.reasoning else {}),
    }


def render_endpoints(model: Model, factor: Decimal) -> dict[str, object]:
    """`data` of `/models/{author}/{slug}/endpoints`: every provider with its own prices."""
    return {
        "id": model.id,
        "name": model.name,
        "created": model.created,
        "description": f"{model.name}, simulated.",
        "architecture": _architecture(model),
        "endpoints": [_endpoint(model, endpoint, factor) for endpoint in model.endpoints],
    }


def _endpoint(model: Model, endpoint: Endpoint, factor: Decimal) -> dict[str, object]:
    return {
        "name": f"{endpoint.provider} | {model.id}",
        "model_id": model.id,
        "model_name": model.name,
        "provider_name": endpoint.provider,
        "tag": endpoint.tag,
        "quantization": "unknown",
        "context_length": model.context,
        "max_completion_tokens": model.max_completion,
        "max_prompt_tokens": None,
        "pricing": scale(endpoint.pricing, factor),
        "supported_parameters": list(model.parameters),
        "status": 0,
        "uptime_last_5m": 100,
        "uptime_last_30m": 100,
        "uptime_last_1d": 99.9,
        "latency_last_30m": {"p50": 0.4, "p75": 0.6, "p90": 0.9, "p99": 2.1},
        "throughput_last_30m": {"p50": 80, "p75": 70, "p90": 60, "p99": 40},
        "supports_implicit_caching": "input_cache_read" in endpoint.pricing,
        "supports_tool_choice": dict.fromkeys(
            ("auto", "function", "none", "required"), model.supports("tool_choice")
        ),
    }


def scale(pricing: Mapping[str, object], factor: Decimal) -> dict[str, object]:
    """A `pricing` object with every price multiplied; "-1" (a router's price) stays what it is."""
    if factor == ONE:
        return dict(pricing)
    scaled: dict[str, object] = {}
    for name, value in pricing.items():
        if isinstance(value, list):
            scaled[name] = [scale(item, factor) for item in value]
        elif name in _UNPRICED or value == "-1":
            scaled[name] = value
        else:
            scaled[name] = plain(Decimal(str(value)) * factor)
    return scaled


def _architecture(model: Model) -> dict[str, object]:
    return {
        "modality": f"{'+'.join(model.inputs)}->{'+'.join(model.outputs)}",
        "input_modalities": list(model.inputs),
        "output_modalities": list(model.outputs),
        "tokenizer": model.id.split("/")[0],
        "instruct_type": None,
    }


def _reasoning(model: Model) -> dict[str, object]:
    mandatory = model.reasoning == "mandatory"
    return {
        "mandatory": mandatory,
        "default_enabled": mandatory,
        "default_effort": "medium" if mandatory else None,
        "supported_efforts": ["high", "medium", "low", "minimal"],
        "supports_max_tokens": True,
    }
