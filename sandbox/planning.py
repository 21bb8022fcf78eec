"""Decides a response, its tokens and its cost before the first byte is sent.

A plan is complete: its generation id already contains the cost of the whole response.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

from sandbox.models.entry import Model
from sandbox.models.market import Market
from sandbox.models.pricing import ZERO, Tokens
from sandbox.models.text_models import BY_ID, STOPS_BILLING_ON_ABORT

from .content import REASONING_TOKENS, Brief, Choice, compose
from .failures import FAILURES, Refusal, invalid_request, refusal
from .generation import FEMTO, Generation, encode
from .request_fields import require_positive
from .routing import Route, after_fallback, candidates, find_route
from .scenarios import Behaviour, build_behaviour, split_model
from .tokens import TOKENS_PER_SEARCH, Prompt, count_prompt

Body = Mapping[str, object]

MAX_CHOICES = 128
EXACT = Decimal(1).scaleb(-FEMTO)
"""The smallest amount that is billed, which is the smallest that a generation id can contain."""
# https://openrouter.ai/docs/features/zero-completion-insurance: a response without output is not charged.
_UNBILLED_BODIES = ("error", "error-choices", "redirect")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that keep responses small for users who pay nothing. None means no limit."""

    answer_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RequestSettings:
    """What decides a response besides the body: the scenario's changes, and this instance's limits and
    prices.
    """

    changes: Mapping[str, object]
    limits: Limits
    market: Market


@dataclass(frozen=True, slots=True)
class Plan:
    """One response, fully decided."""

    id: str
    route: Route
    behaviour: Behaviour
    choices: tuple[Choice, ...]
    generation: Generation
    shows_thoughts: bool = True

    @property
    def model(self) -> Model:
        return self.route.model

    @property
    def tokens(self) -> Tokens:
        return self.generation.tokens

    def running(self, completion: int) -> Tokens:
        """The tokens after so many tokens of the completion."""
        names = ("reasoning", "audio_out", "image_out")
        parts = {name: min(getattr(self.tokens, name), completion) for name in names}
        return replace(self.tokens, completion=completion, **parts)

    def bill(self, tokens: Tokens) -> tuple[Decimal, Decimal]:
        """US dollars: what OpenRouter charges, and what the provider charges to the operator's own key."""
        return _bill(self.route, self.behaviour, tokens)

    def cancelled(self, completion: int) -> Generation:
        """The generation of a stream that the client left after so many tokens."""
        # https://openrouter.ai/docs/api-reference/streaming#stream-cancellation: not every provider stops
        # then.
        if self.route.endpoint.provider not in STOPS_BILLING_ON_ABORT:
            return replace(self.generation, cancelled=True)
        tokens = self.running(completion)
        return self.generation.cancel(tokens, *self.bill(tokens))


def plan_completion(body: Body, settings: RequestSettings) -> Plan:
    """Plans the answer of the first model that can give one; raises the last model's Refusal."""

    def plan(model_id: str, behaviour: Behaviour) -> Plan:
        return _plan_text(
            _require_route(model_id, body, behaviour, settings, "text"), body, behaviour, settings
        )

    return _first_plan(body, settings, plan, after=after_fallback)


def plan_media(
    body: Body,
    settings: RequestSettings,
    output: str,
    api_type: str,
    count: Callable[[Route], Tokens],
    *,
    streamed: bool = False,
) -> Plan:
    """Plans a response without choices, by a model whose output modality is `output`; raises Refusal.

    Scenarios that only text can follow are left out: errors in mid-stream, a provider that dies, another
    model that answers although nobody has named it.
    """

    def plan(model_id: str, behaviour: Behaviour) -> Plan:
        behaviour = replace(behaviour, stream_error="", dies=False, fallback=False)
        route = _require_route(model_id, body, behaviour, settings, output)
        tokens = count(route)
        tokens = Tokens() if behaviour.cache == "hit" else tokens
        generation = _generation(
            route, behaviour, tokens, finish="stop", streamed=streamed, api_type=api_type
        )
        return Plan(_new_id(generation), route, behaviour, (), generation)

    return _first_plan(body, settings, plan, after=lambda ids: ids[1:] or ids)


def _first_plan(
    body: Body,
    settings: RequestSettings,
    plan: Callable[[str, Behaviour], Plan],
    after: Callable[[list[str]], list[str]],
) -> Plan:
    """Tries the models in order, as https://openrouter.ai/docs/guides/routing/model-fallbacks describes."""
    ids = candidates(body)
    if settings.changes.get("fallback"):
        ids = after(ids)
    error = refusal(404, "No models given.")
    for model_id in ids:
        base, behaviour = _behaviour_of(model_id, settings, after)
        try:
            return plan(base, behaviour)
        except Refusal as exc:
            error = exc
    raise error


def _behaviour_of(
    model_id: str, settings: RequestSettings, after: Callable[[list[str]], list[str]]
) -> tuple[str, Behaviour]:
    """The model without its scenario suffixes, and how a request to it is answered."""
    base, changes = split_model(model_id)
    behaviour = _limit_padding(build_behaviour({**settings.changes, **changes}), settings.limits)
    # As a suffix, `fallback` makes this one model fail; in the header it has already dropped the first model.
    if behaviour.fallback and "fallback" in changes:
        return after([base])[0], replace(behaviour, fallback=False)
    return base, behaviour


def _require_route(
    model_id: str, body: Body, behaviour: Behaviour, settings: RequestSettings, output: str
) -> Route:
    if behaviour.failure:
        raise Refusal(FAILURES[behaviour.failure])
    route = find_route(model_id, body, behaviour, settings.market)
    if output not in route.model.outputs:
        raise invalid_request(f"{route.model.id} does not support this endpoint.")
    return route


def _plan_text(route: Route, body: Body, behaviour: Behaviour, settings: RequestSettings) -> Plan:
    prompt = count_prompt(body)
    if prompt.images and "image" not in route.model.inputs:
        raise refusal(404, "No endpoints found that support image input", error_type="not_found")
    searches = _searches(body, route)
    # Search results go into the prompt, and are billed there besides the fee per search.
    prompt += Prompt(searches * TOKENS_PER_SEARCH)
    limit = _completion_limit(body, route.model, prompt.tokens)
    choices = _choices(body, route.model, behaviour, settings.limits, limit)
    tokens = _tokens(prompt, choices, behaviour, route, searches)
    streamed = body.get("stream") is True
    generation = _generation(route, behaviour, tokens, finish=choices[0].finish, streamed=streamed)
    return Plan(_new_id(generation), route, behaviour, choices, generation, shows_thoughts(body))


def _new_id(generation: Generation) -> str:
    return encode(generation, secrets.randbits(40))


def _generation(
    route: Route,
    behaviour: Behaviour,
    tokens: Tokens,
    *,
    finish: str,
    streamed: bool,
    api_type: str = "completions",
) -> Generation:
    cost, upstream_cost = _bill(route, behaviour, tokens)
    return Generation(
        created=int(time.time()),
        model=route.model.id,
        provider=route.endpoint.provider,
        tokens=tokens,
        cost=cost,
        upstream_cost=upstream_cost,
        finish=finish,
        api_type=api_type,
        streamed=streamed,
        byok=behaviour.byok,
        cached_answer=behaviour.cache == "hit",
        late_lookups=behaviour.late_lookups,
    )


def failed_id(body: Body) -> str | None:
    """The id of a refused generation, which costs nothing; None when the body names no known model."""
    model = BY_ID.get(split_model(candidates(body)[0])[0])
    if model is None:
        return None
    provider = model.endpoints[0].provider
    return _new_id(Generation(int(time.time()), model.id, provider, Tokens(), ZERO, finish="error"))


def shows_thoughts(body: Body) -> bool:
    """Whether the response contains the reasoning. It is billed in any case.

    https://openrouter.ai/docs/use-cases/reasoning-tokens; `include_reasoning` is its older form.
    """
    reasoning = body.get("reasoning")
    is_excluded = isinstance(reasoning, Mapping) and reasoning.get("exclude") is True
    return not is_excluded and body.get("include_reasoning") is not False


def _limit_padding(behaviour: Behaviour, limits: Limits) -> Behaviour:
    if limits.answer_bytes is None:
        return behaviour
    return replace(behaviour, padding=min(behaviour.padding, limits.answer_bytes))


def _bill(route: Route, behaviour: Behaviour, tokens: Tokens) -> tuple[Decimal, Decimal]:
    failed = behaviour.body in _UNBILLED_BODIES or (behaviour.stream_error and not tokens.completion)
    # A response from OpenRouter's cache costs nothing, and its usage is zero.
    if failed or behaviour.cache == "hit":
        return ZERO, ZERO
    total = route.prices.cost(tokens).total * behaviour.cost_factor
    # Rounded only where it must be: a quantized decimal would show zeros that OpenRouter does not send.
    total = total if total == (exact := total.quantize(EXACT)) else exact
    return (ZERO, total) if behaviour.byok else (total, ZERO)


def _searches(body: Body, route: Route) -> int:
    """One web search, or none. https://openrouter.ai/docs/guides/features/plugins/web-search"""
    plugins = body.get("plugins")
    listed = plugins if isinstance(plugins, list) else []
    has_plugin = any(isinstance(item, Mapping) and item.get("id") == "web" for item in listed)
    return int(route.online or has_plugin or isinstance(body.get("web_search_options"), Mapping))


def _completion_limit(body: Body, model: Model, prompt: int) -> int:
    """The most completion tokens of one choice; raises Refusal for limits that cannot be met."""
    names = ("max_tokens", "max_completion_tokens")
    requested = [
        require_positive(body[name], f"{name} must be at least 1")
        for name in names
        if body.get(name) is not None
    ]
    # An endpoint without max_tokens among its supported_parameters ignores the limit.
    wanted = min(requested) if requested and model.supports("max_tokens") else 0
    if prompt >= model.context or prompt + wanted > model.context:
        raise too_long(model, prompt, wanted)
    ceiling = min(model.max_completion or model.context, model.context - prompt)
    return min(wanted or ceiling, ceiling)


def too_long(model: Model, prompt: int, wanted: int) -> Refusal:
    """The refusal of more tokens than the model's context holds."""
    return refusal(
        400,
        f"This endpoint's maximum context length is {model.context} tokens. However, you requested about "
        f"{prompt + wanted} tokens ({prompt} of text input, {wanted} in the output). "
        "Please reduce the length of either one.",
        error_type="context_length_exceeded",
    )


def _choices(
    body: Body, model: Model, behaviour: Behaviour, limits: Limits, max_tokens: int
) -> tuple[Choice, ...]:
    number = body.get("n", 1)
    if not isinstance(number, int) or not 1 <= number <= MAX_CHOICES:
        raise invalid_request(f"n must be between 1 and {MAX_CHOICES}")
    brief = Brief(
        body=body,
        max_tokens=max_tokens,
        max_bytes=None if limits.answer_bytes is None else limits.answer_bytes // number,
        thought_tokens=_thought_tokens(body, model, behaviour),
        wanted_tokens=behaviour.tokens,
        calls_tool=behaviour.calls_tool,
    )
    return _broken_off(tuple(compose(brief, index) for index in range(number)), behaviour)


def _broken_off(choices: tuple[Choice, ...], behaviour: Behaviour) -> tuple[Choice, ...]:
    """The choices as far as they come before the scenario's failure."""
    if behaviour.stream_error or behaviour.body in _UNBILLED_BODIES:
        return tuple(_shorten(choice, behaviour.after if choice.index == 0 else 0) for choice in choices)
    if behaviour.dies:
        return tuple(_shorten(choice, choice.tokens // 2) for choice in choices)
    return choices


def _shorten(choice: Choice, limit: int) -> Choice:
    thoughts = choice.thoughts[:limit]
    pieces = choice.pieces[: limit - len(thoughts)]
    return replace(choice, thoughts=thoughts, pieces=pieces, tool=None, finish="error")


def _thought_tokens(body: Body, model: Model, behaviour: Behaviour) -> int:
    """The tokens of reasoning. https://openrouter.ai/docs/use-cases/reasoning-tokens"""
    value = body.get("reasoning")
    reasoning: Mapping[str, object] = value if isinstance(value, Mapping) else {}
    effort = _reasoning_effort(body, reasoning)
    if behaviour.thinks or model.reasoning == "mandatory":
        # A model that always reasons cannot be told not to.
        effort = "medium" if effort == "none" else effort
    elif not (_wants_reasoning(body, reasoning) and model.supports("reasoning")):
        return 0
    tokens, limit = REASONING_TOKENS[effort], reasoning.get("max_tokens")
    return min(tokens, limit) if isinstance(limit, int) else tokens


def _wants_reasoning(body: Body, reasoning: Mapping[str, object]) -> bool:
    is_mentioned = bool(reasoning or body.get("reasoning_effort") or body.get("include_reasoning"))
    return is_mentioned and reasoning.get("enabled") is not False


def _reasoning_effort(body: Body, reasoning: Mapping[str, object]) -> str:
    """The effort in either of its two places; raises Refusal where they differ or name no known effort."""
    effort, short_form = reasoning.get("effort"), body.get("reasoning_effort")
    if effort and short_form and effort != short_form:
        message = "reasoning.effort and reasoning_effort must not differ"
        raise invalid_request(message)
    name = str(effort or short_form or "medium")
    if name not in REASONING_TOKENS:
        raise invalid_request(f"Unknown reasoning effort: {name}")
    return name


def _tokens(
    prompt: Prompt, choices: tuple[Choice, ...], behaviour: Behaviour, route: Route, searches: int
) -> Tokens:
    if behaviour.cache == "hit":
        return Tokens()
    cached = prompt.tokens * 3 // 4 if behaviour.cache == "read" else 0
    return Tokens(
        prompt=prompt.tokens,
        completion=sum(choice.tokens for choice in choices),
        reasoning=sum(len(choice.thoughts) for choice in choices),
        cached=cached,
        cache_write=_cache_write_tokens(prompt, behaviour, route),
        images=prompt.images,
        searches=searches,
    )


def _cache_write_tokens(prompt: Prompt, behaviour: Behaviour, route: Route) -> int:
    if behaviour.cache == "write":
        return prompt.tokens * 3 // 4
    # Providers with a price for cache writes write what `cache_control` marks, and nothing else:
    # https://openrouter.ai/docs/features/prompt-caching
    is_priced = route.prices.input_cache_write is not None
    return prompt.cacheable if not behaviour.cache and is_priced else 0
