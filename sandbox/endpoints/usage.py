"""The usage of a response, in the names of chat, of OpenAI's responses and of Anthropic's messages.

https://openrouter.ai/docs/use-cases/usage-accounting
"""

from __future__ import annotations

from decimal import Decimal

from sandbox.models.pricing import Tokens
from sandbox.planning import Plan
from sandbox.wire import Raw, plain


def render_usage(plan: Plan, tokens: Tokens) -> dict[str, object]:
    """The `usage` object of chat for these tokens. Its cost is written as the scenario says."""
    return {
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
        **_server_tools(tokens),
    }


def _server_tools(tokens: Tokens) -> dict[str, object]:
    """The web searches, which are reported only when there were any."""
    if not tokens.searches:
        return {}
    names = ("tool_calls_executed", "tool_calls_requested", "web_search_requests")
    return {"server_tool_use_details": dict.fromkeys(names, tokens.searches)}


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
    """The same in the names of `/messages`."""
    searches = {"web_search_requests": tokens.searches, "web_fetch_requests": 0}
    return {
        # Unlike the other APIs, Anthropic's does not count cached tokens among the input tokens.
        "input_tokens": tokens.prompt - tokens.cached - tokens.cache_write,
        "cache_creation_input_tokens": tokens.cache_write,
        "cache_read_input_tokens": tokens.cached,
        "cache_creation": {"ephemeral_5m_input_tokens": tokens.cache_write, "ephemeral_1h_input_tokens": 0},
        "output_tokens": tokens.completion,
        "output_tokens_details": {"thinking_tokens": tokens.reasoning} if tokens.reasoning else None,
        "inference_geo": None,
        "server_tool_use": searches if tokens.searches else None,
        "service_tier": "standard",
        **render_cost(plan, tokens),
    }


def render_cost(
    plan: Plan,
    tokens: Tokens,
    names: tuple[str, str] = ("upstream_inference_prompt_cost", "upstream_inference_completions_cost"),
) -> dict[str, object]:
    """What `usage` says about money. `names` are those of the two parts of the cost."""
    if plan.behaviour.cost == "missing":
        return {}
    cost, upstream_cost = plan.bill(tokens)
    parts = plan.route.prices.cost(tokens) * plan.behaviour.cost_factor
    if plan.behaviour.cache == "hit":
        parts *= Decimal(0)
    # With the operator's own key the provider charges them, and OpenRouter's cost is 0.
    details = {
        "upstream_inference_cost": upstream_cost if plan.behaviour.byok else cost,
        names[0]: parts.prompt,
        names[1]: parts.completion,
    }
    is_byok = plan.behaviour.byok
    return {"cost": _written_cost(plan.behaviour.cost, cost), "is_byok": is_byok, "cost_details": details}


def _written_cost(form: str, cost: Decimal) -> object:
    if form == "null":
        return None
    if form == "nan":
        return Raw(b"NaN")
    if form == "string":
        return plain(cost)
    return -cost if form == "negative" else cost
