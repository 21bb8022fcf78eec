"""Decides an answer, its tokens and cost before the first byte. Decided before the first byte.

A plan is complete: its generation id already says what the whole answer costs.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

from .content import REASONING_TOKENS, Brief, Choice, compose
from .failures import FAILURES, Refusal, refusal
from .generation import FEMTO, Generation, encode
from .models.entry import Model
from .models.market import Market
from .models.pricing import ZERO, Tokens
from .models.text_models import BY_ID, STOPS_BILLING_ON_ABORT
from .routing import Route, after_fallback, candidates, find_route
from .scenarios import Behaviour, behave, split_model
from .tokens import TOKENS_PER_SEARCH, Prompt, count_prompt

Body = Mapping[str, object]

MAX_CHOICES = 128
EXACT = Decimal(1).scaleb(-FEMTO)
"""The smallest amount that is billed: what an id can say exactly."""
_UNBILLED_BODIES = ("error", "error-choices", "redirect")


@dataclass(frozen=True, slots=True)
class Limits:
    """What keeps answers small for users who pay nothing; None is no limit."""

    answer_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request brings besides its body: the scenario's changes, the limits and prices of this instance."""

    changes: Mapping[str, object]
    limits: Limits
    market: Market


@dataclass(frozen=True, slots=True)
class Plan:
    """One answer, fully decided."""

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
        """The tokens after so many of the completion."""
        tokens = self.tokens
        parts = {
            name: min(getattr(tokens, name), completion) for name in ("reasoning", "audio_out", "image_out")
        }
        return replace(tokens, completion=completion, **parts)

    def bill(self, tokens: Tokens) -> tuple[Decimal, Decimal]:
        """US dollars that OpenRouter charges, and that the provider charges to the own key."""
        return _bill(self.route, self.behaviour, tokens)

    def cancelled(self, completion: int) -> Generation:
        """The generation when the client left a stream after so many tokens; not every provider stops billing
        then.
        """
        if self.route.endpoint.provider not in STOPS_BILLING_ON_ABORT:
            return replace(self.generation, cancelled=True)
        tokens = self.running(completion)
        return self.generation.cancel(tokens, *self.bill(tokens))


def plan_completion(body: Body, ask: Ask) -> Plan:
    """Plan the answer of the first model that can give one; raises the last one's Refusal."""
    return _first_plan(
        body, ask, lambda model_id, behaviour: _plan(model_id, body, behaviour, ask), after=after_fallback
    )


def plan_media(
    body: Body,
    ask: Ask,
    output: str,
    api_type: str,
    count: Callable[[Route], Tokens],
    *,
    streamed: bool = False,
) -> Plan:
    """Plan an answer without choices, by a model that puts out `output`; raises Refusal.

    What only text can do (errors in mid-stream, a provider that dies, another model that answers unasked) is
    left out.
    """

    def plan(model_id: str, behaviour: Behaviour) -> Plan:
        behaviour = replace(behaviour, stream_error="", dies=False, fallback=False)
        route = _require_route(model_id, body, behaviour, ask, output)
        tokens = count(route)
        tokens = Tokens() if behaviour.cache == "hit" else tokens
        generation = _generation(
            route, behaviour, tokens, finish="stop", streamed=streamed, api_type=api_type
        )
        return Plan(encode(generation, secrets.randbits(40)), route, behaviour, (), generation)

    return _first_plan(body, ask, plan, after=lambda ids: ids[1:] or ids)


def _first_plan(
    body: Body, ask: Ask, plan: Callable[[str, Behaviour], Plan], after: Callable[[list[str]], list[str]]
) -> Plan:
    ids = candidates(body)
    if ask.changes.get("fallback"):
        ids = after(ids)
    last = refusal(404, "No models given.")
    for model_id in ids:
        base, more = split_model(model_id)
        behaviour = _limit_padding(behave({**ask.changes, **more}), ask.limits)
        if behaviour.fallback and "fallback" in more:
            base, behaviour = after([base])[0], replace(behaviour, fallback=False)
        try:
            return plan(base, behaviour)
        except Refusal as exc:
            last = exc
    raise last


def _require_route(model_id: str, body: Body, behaviour: Behaviour, ask: Ask, output: str) -> Route:
    if behaviour.failure:
        raise Refusal(FAILURES[behaviour.failure])
    route = find_route(model_id, body, behaviour, ask.market)
    if output not in route.model.outputs:
        raise refusal(400, f"{route.model.id} does not support this endpoint.", error_type="invalid_request")
    return route


def _plan(model_id: str, body: Body, behaviour: Behaviour, ask: Ask) -> Plan:
    route = _require_route(model_id, body, behaviour, ask, "text")
    prompt = count_prompt(body)
    if prompt.images and "image" not in route.model.inputs:
        raise refusal(404, "No endpoints found that support image input", error_type="not_found")
    searches = _searches(body, route)
    prompt += Prompt(searches * TOKENS_PER_SEARCH)
    most = _most_tokens(body, route.model, prompt.tokens)
    choices = _choices(body, route.model, behaviour, ask.limits, most)
    tokens = _tokens(prompt, choices, behaviour, route, searches)
    generation = _generation(
        route, behaviour, tokens, finish=choices[0].finish, streamed=body.get("stream") is True
    )
    return Plan(
        encode(generation, secrets.randbits(40)), route, behaviour, choices, generation, shows_thoughts(body)
    )


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
    """The id of a refused generation, which costs nothing; None when no known model was asked for."""
    model = BY_ID.get(split_model(candidates(body)[0])[0])
    if model is None:
        return None
    generation = Generation(
        int(time.time()), model.id, model.endpoints[0].provider, Tokens(), ZERO, finish="error"
    )
    return encode(generation, secrets.randbits(40))


def shows_thoughts(body: Body) -> bool:
    """Whether reasoning is part of the answer (it is billed in any case)."""
    wishes = body.get("reasoning")
    excluded = isinstance(wishes, Mapping) and wishes.get("exclude") is True
    return not excluded and body.get("include_reasoning") is not False


def _limit_padding(behaviour: Behaviour, limits: Limits) -> Behaviour:
    if limits.answer_bytes is None:
        return behaviour
    return replace(behaviour, padding=min(behaviour.padding, limits.answer_bytes))


def _bill(route: Route, behaviour: Behaviour, tokens: Tokens) -> tuple[Decimal, Decimal]:
    failed = behaviour.body in _UNBILLED_BODIES or (behaviour.stream_error and not tokens.completion)
    if failed or behaviour.cache == "hit":
        return ZERO, ZERO
    total = route.prices.cost(tokens).total * behaviour.cost_factor
    total = total if total == (exact := total.quantize(EXACT)) else exact
    return (ZERO, total) if behaviour.byok else (total, ZERO)


def _searches(body: Body, route: Route) -> int:
    plugins = body.get("plugins")
    listed = plugins if isinstance(plugins, list) else []
    plugged = any(isinstance(item, Mapping) and item.get("id") == "web" for item in listed)
    return int(route.online or plugged or isinstance(body.get("web_search_options"), Mapping))


def _most_tokens(body: Body, model: Model, prompt: int) -> int:
    """The most completion tokens of one choice; raises Refusal for limits that cannot be met."""
    asked = [
        _limit(body, name) for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None
    ]
    wanted = min(asked) if asked and model.supports("max_tokens") else 0
    if prompt >= model.context or prompt + wanted > model.context:
        raise too_long(model, prompt, wanted)
    ceiling = min(model.max_completion or model.context, model.context - prompt)
    return min(wanted or ceiling, ceiling)


def _limit(body: Body, name: str) -> int:
    value = body[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refusal(400, f"{name} must be at least 1", error_type="invalid_request")
    return value


def too_long(model: Model, prompt: int, wanted: int) -> Refusal:
    """More tokens than the model's context holds."""
    return refusal(
        400,
        f"This endpoint's maximum context length is {model.context} tokens. However, you requested about "
        f"{prompt + wanted} tokens ({prompt} of text input, {wanted} in the output). "
        "Please reduce the length of either one.",
        error_type="context_length_exceeded",
    )


def _choices(body: Body, model: Model, behaviour: Behaviour, limits: Limits, most: int) -> tuple[Choice, ...]:
    number = body.get("n", 1)
    if not isinstance(number, int) or not 1 <= number <= MAX_CHOICES:
        raise refusal(400, f"n must be between 1 and {MAX_CHOICES}", error_type="invalid_request")
    brief = Brief(
        body=body,
        most_tokens=most,
        most_bytes=None if limits.answer_bytes is None else limits.answer_bytes // number,
        thought_tokens=_thought_tokens(body, model, behaviour),
        wanted_tokens=behaviour.tokens,
        calls_tool=behaviour.calls_tool,
    )
    choices = tuple(compose(brief, index) for index in range(number))
    if behaviour.stream_error or behaviour.body in _UNBILLED_BODIES:
        return tuple(_shorten(choice, behaviour.after if choice.index == 0 else 0) for choice in choices)
    if behaviour.dies:
        return tuple(_shorten(choice, choice.tokens // 2) for choice in choices)
    return choices


def _shorten(choice: Choice, most: int) -> Choice:
    thoughts = choice.thoughts[:most]
    pieces = choice.pieces[: most - len(thoughts)]
    return replace(choice, thoughts=thoughts, pieces=pieces, tool=None, finish="error")


def _thought_tokens(body: Body, model: Model, behaviour: Behaviour) -> int:
    wishes = body.get("reasoning")
    wishes = wishes if isinstance(wishes, Mapping) else {}
    effort, short = wishes.get("effort"), body.get("reasoning_effort")
    if effort and short and effort != short:
        raise refusal(
            400, "reasoning.effort and reasoning_effort must not differ", error_type="invalid_request"
        )
    asked = bool(wishes or short or body.get("include_reasoning")) and wishes.get("enabled") is not False
    wanted = str(effort or short or "medium")
    if wanted not in REASONING_TOKENS:
        raise refusal(400, f"Unknown reasoning effort: {wanted}", error_type="invalid_request")
    if behaviour.thinks or model.reasoning == "mandatory":
        wanted = "medium" if wanted == "none" else wanted
    elif not (asked and model.supports("reasoning")):
        return 0
    most = wishes.get("max_tokens")
    tokens = REASONING_TOKENS[wanted]
    return min(tokens, most) if isinstance(most, int) else tokens


def _tokens(
    prompt: Prompt, choices: tuple[Choice, ...], behaviour: Behaviour, route: Route, searches: int
) -> Tokens:
    if behaviour.cache == "hit":
        return Tokens()
    cached = prompt.tokens * 3 // 4 if behaviour.cache == "read" else 0
    written = prompt.tokens * 3 // 4 if behaviour.cache == "write" else 0
    if not behaviour.cache and route.prices.input_cache_write is not None:
        written = prompt.cacheable
    return Tokens(
        prompt=prompt.tokens,
        completion=sum(choice.tokens for choice in choices),
        reasoning=sum(len(choice.thoughts) for choice in choices),
        cached=cached,
        cache_write=written,
        images=prompt.images,
        searches=searches,
    )
