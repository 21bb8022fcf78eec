"""`/models` and `/models/{author}/{slug}/endpoints` in OpenRouter's shapes, made from the model table.

https://openrouter.ai/docs/guides/overview/models
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal

from sandbox.wire import plain

from .entry import Endpoint, Model
from .pricing import ONE
from .text_models import MODELS

MAX_PAGE = 1000
_EMPTY_FIELDS = (
    "hugging_face_id",
    "per_request_limits",
    "default_parameters",
    "expiration_date",
    "knowledge_cutoff",
)
# What OpenRouter measures or knows of each endpoint, and what a simulator can only make up.
_MEASUREMENTS: Mapping[str, object] = {
    "quantization": "unknown",
    "max_prompt_tokens": None,
    "status": 0,
    "uptime_last_5m": 100,
    "uptime_last_30m": 100,
    "uptime_last_1d": 99.9,
    "latency_last_30m": {"p50": 0.4, "p75": 0.6, "p90": 0.9, "p99": 2.1},
    "throughput_last_30m": {"p50": 80, "p75": 70, "p90": 60, "p99": 40},
}
# Entries of a `pricing` object that are not prices.
_UNPRICED = frozenset({"discount", "min_prompt_tokens", "overrides"})


def list_models(
    query: Mapping[str, str], factor_of: Decimal | Callable[[str], Decimal]
) -> list[dict[str, object]]:
    """The models that the query selects. Prices are multiplied by a factor, the same for all or one for each
    id.

    Without `output_modalities`, OpenRouter lists only the models that write text.
    """
    models = [model for model in MODELS if _matches(model, query)]
    offset, limit = _number(query, "offset", 0), min(_number(query, "limit", MAX_PAGE), MAX_PAGE)
    return [
        render_model(model, factor_of if isinstance(factor_of, Decimal) else factor_of(model.id))
        for model in models[offset : offset + limit]
    ]


def _matches(model: Model, query: Mapping[str, str]) -> bool:
    modalities = set(query.get("output_modalities", "text").split(","))
    parameters = [name for name in query.get("supported_parameters", "").split(",") if name]
    if "all" not in modalities and not modalities & set(model.outputs):
        return False
    has_words = query.get("q", "").lower() in f"{model.id} {model.name}".lower()
    return has_words and all(model.supports(name) for name in parameters)


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name, "")
    return int(text) if text.isdecimal() else default


def render_model(model: Model, factor: Decimal) -> dict[str, object]:
    """One entry of `/models`."""
    return {
        "id": model.id,
        "canonical_slug": model.slug or model.id,
        "name": model.name,
        "created": model.created,
        "description": f"{model.name}, simulated: its answers are made up, its prices and shapes are real.",
        "context_length": model.context,
        "architecture": _architecture(model),
        "pricing": scale(model.endpoints[0].pricing, factor),
        "top_provider": _top_provider(model),
        "supported_parameters": list(model.parameters),
        "supported_voices": list(model.voices) or None,
        "links": {"details": f"/api/v1/models/{model.id}/endpoints"},
        **dict.fromkeys(_EMPTY_FIELDS),
        **({"reasoning": _reasoning(model)} if model.reasoning else {}),
    }


def _top_provider(model: Model) -> dict[str, object]:
    return {
        "context_length": model.context,
        "max_completion_tokens": model.max_completion,
        "is_moderated": model.style == "openai" and model.id.startswith("openai/"),
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
    tool_choices = ("auto", "function", "none", "required")
    return {
        "name": f"{endpoint.provider} | {model.id}",
        "model_id": model.id,
        "model_name": model.name,
        "provider_name": endpoint.provider,
        "tag": endpoint.tag,
        "context_length": model.context,
        "max_completion_tokens": model.max_completion,
        "pricing": scale(endpoint.pricing, factor),
        "supported_parameters": list(model.parameters),
        "supports_implicit_caching": "input_cache_read" in endpoint.pricing,
        "supports_tool_choice": dict.fromkeys(tool_choices, model.supports("tool_choice")),
        **_MEASUREMENTS,
    }


def scale(pricing: Mapping[str, object], factor: Decimal) -> dict[str, object]:
    """A `pricing` object with every price multiplied. The "-1" of a router (its price varies) stays."""
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
