"""Usage in each API's names. In the names of chat, of OpenAI's responses and of Anthropic's messages."""

from __future__ import annotations

from decimal import Decimal

from sandbox.models.pricing import Tokens
from sandbox.planning import Plan
from sandbox.wire import Raw, plain


def render_usage(plan: Plan, tokens: Tokens) -> dict[str, object]:
    """The `usage` object of chat, for these tokens; its cost is written as the scenario says."""
    usage: dict[str, object] = {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "total_tokens": tokens.prompt + tokens.completion,
        **render_cost(plan, tokens),
        "prompt_tokens_details": {
            "cached_tokens": tokens.cached,
            "cache_write_tokens": tokens.cache_write,
            "audio_tokens": 0,
            "video_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": tokens.reasoning,
            "image_tokens": tokens.image_out,
            "audio_tokens": tokens.audio_out,
        },
    }
    if tokens.searches:
        usage["server_tool_use_details"] = {
            "tool_calls_executed": tokens.searches,
            "tool_calls_requested": tokens.searches,
            "web_search_requests": tokens.searches,
        }
    return usage


def render_response_usage(plan: Plan, tokens: Tokens) -> dict[str, object]:
    """The same in the names of `/responses`."""
    return {
        "input_tokens": tokens.prompt,
        "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": tokens.cache_write},
        "output_tokens": tokens.completion,
        "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
        "total_tokens": tokens.prompt + tokens.completion,
        **render_cost(plan, tokens, ("upstream_inference_input_cost", "upstream_inference_output_cost")),
    }


def render_message_usage(plan: Plan, tokens: Tokens) -> dict[str, object]:
    """The same in the names of `/messages`, where `input_tokens` leaves out what was read from or written to
    the cache.
    """
    return {
        "input_tokens": tokens.prompt - tokens.cached - tokens.cache_write,
        "cache_creation_input_tokens": tokens.cache_write,
        "cache_read_input_tokens": tokens.cached,
        "cache_creation": {"ephemeral_5m_input_tokens": tokens.cache_write, "ephemeral_1h_input_tokens": 0},
        "output_tokens": tokens.completion,
        "output_tokens_details": {"thinking_tokens": tokens.reasoning} if tokens.reasoning else None,
        "inference_geo": None,
        "server_tool_use": {"web_search_requests": tokens.searches, "web_fetch_requests": 0}
        if tokens.searches
        else None,
        "service_tier": "standard",
        **render_cost(plan, tokens),
    }


def render_cost(
    plan: Plan,
    tokens: Tokens,
    names: tuple[str, str] = ("upstream_inference_prompt_cost", "upstream_inference_completions_cost"),
) -> dict[str, object]:
    """What `usage` says of money, if anything."""
    if plan.behaviour.cost == "missing":
        return {}
    cost, upstream_cost = plan.bill(tokens)
    inner = upstream_cost if plan.behaviour.byok else cost
    parts = plan.route.prices.cost(tokens) * plan.behaviour.cost_factor
    if plan.behaviour.cache == "hit":
        parts *= Decimal(0)
    return {
        "cost": _written_cost(plan.behaviour.cost, cost),
        "is_byok": plan.behaviour.byok,
        "cost_details": {
            "upstream_inference_cost": inner,
            names[0]: parts.prompt,
            names[1]: parts.completion,
        },
    }


def _written_cost(form: str, cost: Decimal) -> object:
    if form == "null":
        return None
    if form == "nan":
        return Raw(b"NaN")
    if form == "string":
        return plain(cost)
    return -cost if form == "negative" else cost
