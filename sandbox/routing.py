"""Chooses the model and the provider that answer, and their price.

The rules follow https://openrouter.ai/docs/features/provider-routing, as far as they decide who is paid what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from sandbox.models.entry import THINKING, Endpoint, Model
from sandbox.models.market import Market
from sandbox.models.pricing import Prices
from sandbox.models.text_models import BY_ID, CHEAPEST

from .failures import Refusal, invalid_request, max_price_excludes, refusal, unavailable
from .scenarios import Behaviour, split_model

# https://openrouter.ai/docs/guides/routing/model-variants/overview; `:free` models have entries of their own.
VARIANTS = ("nitro", "floor", "online", "exacto")
# A request without a model goes to the account's default model.
DEFAULT_MODEL = "openrouter/auto"


@dataclass(frozen=True, slots=True)
class Route:
    """The model and provider that answer, and the prices they charge for this request."""

    model: Model
    endpoint: Endpoint
    prices: Prices
    online: bool = False


def candidates(body: Mapping[str, object]) -> list[str]:
    """The models to try, in order: `model`, then the fallbacks in `models`."""
    listed = body.get("models")
    ids = [body.get("model"), *(listed if isinstance(listed, list) else [])]
    return list(dict.fromkeys(str(item) for item in ids if item)) or [DEFAULT_MODEL]


def after_fallback(ids: list[str]) -> list[str]:
    """The models to try once the first one has failed."""
    if len(ids) > 1:
        return ids[1:]
    first, _ = split_model(ids[0])
    return [CHEAPEST.id if first != CHEAPEST.id else "openai/gpt-4o-mini"]


def find_route(model_id: str, body: Mapping[str, object], behaviour: Behaviour, market: Market) -> Route:
    """The route for this model id; raises Refusal when nothing can serve it."""
    model, variant = _find_model(model_id)
    preferences = _preferences(body)
    _require_capabilities(model, body, preferences)
    endpoints = _sorted(_allowed(model, preferences), preferences, behaviour, variant)
    maximum = _max_price(preferences)
    # The rise comes before max_price is checked: a client that has not read the new price is refused.
    if behaviour.rise_factor:
        market.rise(model.id, behaviour.rise_factor)
    factor = behaviour.price_factor * market.factor_of(model.id)
    for endpoint in endpoints:
        prices = endpoint.prices * factor
        if not prices.exceeds(maximum):
            return Route(model, endpoint, prices, online=variant == "online")
    raise Refusal(max_price_excludes(model.id))


def _preferences(body: Mapping[str, object]) -> Mapping[str, object]:
    provider = body.get("provider")
    return provider if isinstance(provider, Mapping) else {}


def _sorted(
    endpoints: list[Endpoint], preferences: Mapping[str, object], behaviour: Behaviour, variant: str
) -> list[Endpoint]:
    """The endpoints in the order in which they are tried; `:floor` means the same as sorting by price."""
    if behaviour.dearer or variant == "floor" or preferences.get("sort") == "price":
        endpoints.sort(key=lambda endpoint: endpoint.prices.completion, reverse=behaviour.dearer)
    return endpoints


def _find_model(model_id: str) -> tuple[Model, str]:
    variant = ""
    if model_id not in BY_ID and model_id.rpartition(":")[2] in VARIANTS:
        model_id, _, variant = model_id.rpartition(":")
    model = BY_ID.get(model_id)
    if model is None:
        raise refusal(400, f"{model_id} is not a valid model ID")
    return BY_ID.get(model.stands_for, model), variant


def _require_capabilities(
    model: Model, body: Mapping[str, object], preferences: Mapping[str, object]
) -> None:
    if preferences.get("require_parameters"):
        missing = [name for name in THINKING if name in body and not model.supports(name)]
        if missing:
            detail = f"No endpoints found that support: {', '.join(missing)}."
            raise Refusal(unavailable(model.id, "constraint_filtered", 404, ["require_parameters"], detail))
    # Tools are the one parameter that is never ignored silently.
    if body.get("tools") and not model.supports("tools") and "text" in model.outputs:
        raise refusal(404, "No endpoints found that support tool use.", error_type="not_found")


def _allowed(model: Model, preferences: Mapping[str, object]) -> list[Endpoint]:
    """The model's endpoints that the preferences leave over, those in `order` first."""
    order, only, ignore = (_names(preferences.get(name)) for name in ("order", "only", "ignore"))
    # Without fallbacks, `order` is a list of all that may answer.
    if preferences.get("allow_fallbacks") is False and order:
        only = [name for name in order if not only or name in only]
    endpoints = [
        item for item in model.endpoints if (not only or item.tag in only) and item.tag not in ignore
    ]
    if not endpoints:
        message = "No allowed providers are available for the selected model."
        raise refusal(404, message, error_type="not_found")
    return sorted(endpoints, key=lambda item: order.index(item.tag) if item.tag in order else len(order))


def _names(value: object) -> list[str]:
    return [str(item).lower().replace(" ", "-") for item in value] if isinstance(value, list) else []


def _max_price(preferences: Mapping[str, object]) -> dict[str, Decimal]:
    maximum = preferences.get("max_price")
    if not isinstance(maximum, Mapping):
        return {}
    try:
        return {str(name): Decimal(str(value)) for name, value in maximum.items() if value is not None}
    except InvalidOperation:
        raise invalid_request("provider.max_price must hold numbers") from None
