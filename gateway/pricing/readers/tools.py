"""Tools, plugins, web search. Those that clients run cost their text; the upstream's own, more.

A tool that the upstream runs is let through where its documentation bounds both its calls and its fee.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from common.errors import UnboundedCost
from common.money import EXACT
from gateway.pricing.cost_drivers import (
    TOOL_TOKENS,
    TOOLS_TOKENS,
    CostDrivers,
    choice_of,
    integer,
    list_of,
    object_of,
    price_of,
    wrong,
)

MAX_SEARCH_RESULTS = 25
DEFAULT_SEARCH_RESULTS = 5
DEFAULT_SEARCHES = 1  # every one more is held with the whole context
# The most steps of one request: https://openrouter.ai/docs/guides/features/server-tools#tool-call-limits
MAX_TOOL_STEPS = 30
# Anthropic's own loop around its web search pauses after ten rounds (`pause_turn`), whatever `max_uses` is.
NATIVE_TURNS = 11

CLIENT_TOOLS = frozenset(("function", "custom"))
RESPONSES_TOOLS = frozenset(("function", "custom", "local_shell", "apply_patch"))
SEARCH_TOOLS = frozenset(
    ("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11")
)
ANTHROPIC_SEARCH = "web_search_20250305"
ANTHROPIC_TOOLS = re.compile(
    r"(?:bash|text_editor|computer|memory)_\d{8}"
)  # run by the client, described by Anthropic
ANTHROPIC_TOOL_TOKENS = 1_024

HARMLESS_PLUGINS = frozenset(("response-healing", "context-compression", "moderation"))
SEARCH_ENGINES = frozenset(("exa", "parallel", "perplexity"))  # search once a call, at a documented price
PDF_ENGINES = frozenset(("native", "cloudflare-ai", "pdf-text"))  # without a fee per page


def read_tools(endpoint: str, body: Mapping[str, Any], ask: CostDrivers) -> None:
    """The tools of a body, and the end of the loop in which the upstream runs its own."""
    tools, functions = list_of(body, "tools"), list_of(body, "functions")
    if not tools and not functions:
        return
    ask.allowance += TOOLS_TOKENS + TOOL_TOKENS * (len(tools) + len(functions))
    sent = [_read_tool(endpoint, tool, ask) for tool in tools]
    if ask.tool_steps:
        if ask.native_turns and any(str(tool.get("type")).startswith("openrouter:") for tool in sent):
            raise UnboundedCost(
                f"`{ANTHROPIC_SEARCH}` has no bound together with OpenRouter's own tools.", param="tools"
            )
        ask.patch["tools"] = sent
        _end_the_loop(body, ask)


def _read_tool(endpoint: str, tool: object, ask: CostDrivers) -> Mapping[str, Any]:
    """The tool as it is sent: a web search gets an engine with a known price, where the client named none."""
    if not isinstance(tool, dict):
        raise wrong("tools", "a list of objects")
    kind = tool.get("type")
    if not isinstance(kind, str):
        if kind is None and endpoint == "messages":
            return tool
        raise _no_bound(kind)
    if kind in CLIENT_TOOLS or (endpoint == "responses" and kind in RESPONSES_TOOLS):
        return tool
    if endpoint in ("chat/completions", "responses", "messages") and kind.startswith("openrouter:"):
        return _read_server_tool(kind, tool, ask)
    if endpoint == "responses":
        return _read_responses_tool(kind, tool, ask)
    if endpoint == "messages":
        return _read_anthropic_tool(kind, tool, ask)
    raise _no_bound(kind)


def _read_server_tool(kind: str, tool: Mapping[str, Any], ask: CostDrivers) -> Mapping[str, Any]:
    if kind == "openrouter:datetime":
        ask.tool_steps += 1
        return tool
    if kind != "openrouter:web_search":
        raise _no_bound(kind)
    return {**tool, "parameters": _read_search_tool(object_of(tool.get("parameters"), "tools"), ask)}


def _read_responses_tool(kind: str, tool: Mapping[str, Any], ask: CostDrivers) -> Mapping[str, Any]:
    if kind in SEARCH_TOOLS:
        if (
            tool.get("parameters") is not None
        ):  # OpenRouter's form of it takes them there, and may prefer them
            raise UnboundedCost(
                f"The settings of {kind!r} stand beside its `type`, and not in `parameters`.", param="tools"
            )
        return _read_search_tool(tool, ask)
    if kind != "namespace":
        raise _no_bound(kind)
    members = list_of(tool, "tools", "tools.")
    ask.allowance += TOOL_TOKENS * len(members)
    for member in members:
        if not isinstance(member, dict) or member.get("type") not in ("function", "custom"):
            raise _no_bound("namespace")
    return tool


def _read_anthropic_tool(kind: str, tool: Mapping[str, Any], ask: CostDrivers) -> Mapping[str, Any]:
    if kind == ANTHROPIC_SEARCH:
        ask.native_turns = NATIVE_TURNS
        return _read_search_tool(tool, ask, has_engine=False)
    if not ANTHROPIC_TOOLS.fullmatch(kind):
        raise _no_bound(kind)
    ask.allowance += ANTHROPIC_TOOL_TOKENS
    return tool


def _read_search_tool(
    settings: Mapping[str, Any], ask: CostDrivers, *, has_engine: bool = True
) -> Mapping[str, Any]:
    uses = integer(settings, "max_uses", MAX_TOOL_STEPS, "tools.")
    if uses is None:  # as most clients send it, that know of no bound
        uses = DEFAULT_SEARCHES
        settings = {**settings, "max_uses": uses}
    results = integer(settings, "max_results", MAX_SEARCH_RESULTS, "tools.") or DEFAULT_SEARCH_RESULTS
    ask.tool_searches += uses
    ask.tool_results = max(ask.tool_results, results)
    ask.tool_steps += uses
    return {**settings, "engine": _engine(settings.get("engine"), "tools")} if has_engine else settings


def _end_the_loop(body: Mapping[str, Any], ask: CostDrivers) -> None:
    """Hold the loop to so many steps, or the client's own fewer.

    Any condition of `stop_server_tools_when` ends it, and then `max_tool_calls` is ignored; hence both are
    set. Source: https://openrouter.ai/docs/guides/features/server-tools#tool-call-limits
    """
    conditions = [
        object_of(condition, "stop_server_tools_when")
        for condition in list_of(body, "stop_server_tools_when")
    ]
    steps = [integer(body, "max_tool_calls")]
    for condition in conditions:
        if condition.get("type") == "step_count_is":
            steps.append(integer(condition, "step_count", None, "stop_server_tools_when."))
        elif condition.get("type") == "max_cost":
            cost = price_of(condition.get("max_cost_in_dollars"), "stop_server_tools_when").scaleb(9, EXACT)
            ask.tool_cost = cost if ask.tool_cost is None else min(ask.tool_cost, cost)
    ask.tool_steps = min(ask.tool_steps, MAX_TOOL_STEPS, *(own for own in steps if own is not None))
    ask.patch["stop_server_tools_when"] = [
        *conditions,
        {"type": "step_count_is", "step_count": ask.tool_steps},
    ]
    if body.get("max_tool_calls") is not None:
        ask.patch["max_tool_calls"] = ask.tool_steps


def _no_bound(kind: object) -> UnboundedCost:
    known = "function tools and web searches"
    return UnboundedCost(
        f"A tool of type {str(kind)[:40]!r} has no bound here. These have one: {known}.", param="tools"
    )


def _engine(value: object, param: str) -> str:
    return "exa" if value in (None, "auto") else choice_of(value, SEARCH_ENGINES, "A search engine", param)


def read_plugins(body: Mapping[str, Any], ask: CostDrivers, suffixes: set[str]) -> None:
    for plugin in [object_of(plugin, "plugins") for plugin in list_of(body, "plugins")]:
        if plugin.get("id") == "auto-router":
            ask.routing = plugin
        else:
            ask.plugins.append(_read_plugin(plugin, ask) if plugin.get("enabled") is not False else plugin)
    if "online" in suffixes and not ask.search_results:
        ask.plugins.append(_read_search({"id": "web"}, ask))
    if ask.search_results:
        ask.patch["plugins"] = ask.plugins
    if ask.has_files and ask.pdf_engine is None:
        hint = (
            '`plugins: [{"id": "file-parser", "pdf": {"engine": "cloudflare-ai"}}]`, or the engine "native"'
        )
        raise UnboundedCost(
            f"Files may be billed by the page. Choose a parser without a fee: {hint}.", param="plugins"
        )


def _read_plugin(plugin: Mapping[str, Any], ask: CostDrivers) -> Mapping[str, Any]:
    """The plugin as it is sent: a web search gets an engine that searches once, where the client named none."""
    kind = plugin.get("id")
    if kind == "web":
        return _read_search(plugin, ask)
    if kind == "file-parser":
        engine = object_of(plugin.get("pdf"), "plugins").get("engine")
        ask.pdf_engine = choice_of(engine, PDF_ENGINES, "A PDF engine", "plugins")
    elif not isinstance(kind, str) or kind not in HARMLESS_PLUGINS:
        raise UnboundedCost("One of the plugins has no bound.", param="plugins")
    return plugin


def _read_search(plugin: Mapping[str, Any], ask: CostDrivers) -> Mapping[str, Any]:
    named = _engine(plugin.get("engine"), "plugins")
    if plugin.get("x_search") is not None:
        raise UnboundedCost("Searches on X are billed by the item, without a limit.", param="plugins")
    results = integer(plugin, "max_results", MAX_SEARCH_RESULTS, "plugins.") or DEFAULT_SEARCH_RESULTS
    ask.search_results += results
    return {**plugin, "engine": named}
