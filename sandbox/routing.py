"""Which model and provider answer, at what price. Variants, provider preferences, `max_price`, capabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from .failures import Refusal, max_price_excludes, refusal, unavailable
from .models.entry import THINKING, Endpoint, Model
from .models.market import Market
from .models.pricing import Prices
from .models.text_models import BY_ID, CHEAPEST
from .scenarios import Behaviour, split_model

VARIANTS = ("nitro", "floor", "online", "exacto")
DEFAULT_MODEL = "openrouter/auto"


@dataclass(frozen=True, slots=True)
class Route:
    """The model and provider that answer, and the prices they charge for this request."""

    model: Model
    endpoint: Endpoint
    prices: Prices
    online: bool = False


def candidates(body: Mapping[str, object]) -> list[str]:
    """The models to try, in order."""
    listed = body.get("models")
    ids = [body.get("model"), *(listed if isinstance(listed, list) else [])]
    return list(dict.fromkeys(str(item) for item in ids if item)) or [DEFAULT_MODEL]


def after_fallback(ids: list[str]) -> list[str]:
    """What is tried when the first model has failed."""
    if len(ids) > 1:
        return ids[1:]
    first, _ = split_model(ids[0])
    return [CHEAPEST.id if first != CHEAPEST.id else "openai/gpt-4o-mini"]


def find_route(model_id: str, body: Mapping[str, object], behaviour: Behaviour, market: Market) -> Route:
    """The route for this model id; raises Refusal when nothing can serve it."""
    model, variant = _find_model(model_id)
    _require_capabilities(model, body)
    preferences = body.get("provider")
    wishes = preferences if isinstance(preferences, Mapping) else {}
    endpoints = _allowed(model, wishes)
    if behaviour.dearer or variant == "floor" or wishes.get("sort") == "price":
        endpoints.sort(key=lambda endpoint: endpoint.prices.completion, reverse=behaviour.dearer)
    maximum = _max_price(wishes)
    if behaviour.rise_factor:
        market.rise(model.id, behaviour.rise_factor)
    factor = behaviour.price_factor * market.factor_of(model.id)
    for endpoint in endpoints:
        prices = endpoint.prices * factor
        if not prices.exceeds(maximum):
            return Route(model, endpoint, prices, online=variant == "online")
    raise Refusal(max_price_excludes(model.id))


def _find_model(model_id: str) -> tuple[Model, str]:
    variant = ""
    if model_id not in BY_ID and model_id.rpartition(":")[2] in VARIANTS:
        model_id, _, variant = model_id.rpartition(":")
    model = BY_ID.get(model_id)
    if model is None:
        raise refusal(400, f"{model_id} is not a valid model ID")
    return BY_ID.get(model.stands_for, model), variant


def _require_capabilities(model: Model, body: Mapping[str, object]) -> None:
    wishes = body.get("provider")
    if isinstance(wishes, Mapping) and wishes.get("require_parameters"):
        missing = [name for name in THINKING if name in body and not model.supports(name)]
        if missing:
            detail = f"No endpoints found that support: {', '.join(missing)}."
            raise Refusal(unavailable(model.id, "constraint_filtered", 404, ["require_parameters"], detail))
    if body.get("tools") and not model.supports("tools") and "text" in model.outputs:
        raise refusal(404, "No endpoints found that support tool use.", error_type="not_found")


def _allowed(model: Model, wishes: Mapping[str, object]) -> list[Endpoint]:
    order, only, ignore = (_names(wishes.get(name)) for name in ("order", "only", "ignore"))
    if wishes.get("allow_fallbacks") is False and order:
        only = [name for name in order if not only or name in only]
    endpoints = [
        endpoint
        for endpoint in model.endpoints
        if (not only or endpoint.tag in only) and endpoint.tag not in ignore
    ]
    if not endpoints:
        raise refusal(
            404, "No allowed providers are available for the selected model.", error_type="not_found"
        )
    return sorted(endpoints, key=lambda item: order.index(item.tag) if item.tag in order else len(order))


def _names(value: object) -> list[str]:
    return [str(item).lower().replace(" ", "-") for item in value] if isinstance(value, list) else []


def _max_price(wishes: Mapping[str, object]) -> dict[str, Decimal]:
    maximum = wishes.get("max_price")
    if not isinstance(maximum, Mapping):
        return {}
    try:
        return {str(name): Decimal(str(value)) for name, value in maximum.items() if value is not None}
    except InvalidOperation:
        raise refusal(400, "provider.max_price must hold numbers", error_type="invalid_request") from None
