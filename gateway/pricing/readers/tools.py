"""Tools, plugins and web searches. Tools that the client runs cost their text; the upstream's own cost more.

A tool that the upstream runs may pass only where documentation bounds both its calls and its fee.
"""

from __future__ import annotations

import re

from common.errors import UnboundedCost
from common.json_types import Json, JsonObject
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
DEFAULT_SEARCHES = 1  # each further one is held with the whole context
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
# Tools that the client runs and Anthropic describes.
ANTHROPIC_TOOLS = re.compile(r"(?:bash|text_editor|computer|memory)_\d{8}")
ANTHROPIC_TOOL_TOKENS = 1_024

HARMLESS_PLUGINS = frozenset(("response-healing", "context-compression", "moderation"))
SEARCH_ENGINES = frozenset(("exa", "parallel", "perplexity"))  # search once a call, at a documented price
PDF_ENGINES = frozenset(("native", "cloudflare-ai", "pdf-text"))  # without a fee per page
NO_PARSER = (
    "Files may be billed by the page. Choose a parser without a fee: "
    '`plugins: [{"id": "file-parser", "pdf": {"engine": "cloudflare-ai"}}]`, or the engine "native".'
)


def read_tools(endpoint: str, body: JsonObject, drivers: CostDrivers) -> None:
    """The tools of a body, and the end of the loop in which the upstream runs its own."""
    tools, functions = list_of(body, "tools"), list_of(body, "functions")
    if not tools and not functions:
        return
    drivers.allowance += TOOLS_TOKENS + TOOL_TOKENS * (len(tools) + len(functions))
    outgoing = [_read_tool(endpoint, tool, drivers) for tool in tools]
    if not drivers.tool_steps:
        return
    if drivers.native_turns and any(str(tool.get("type")).startswith("openrouter:") for tool in outgoing):
        message = f"`{ANTHROPIC_SEARCH}` has no bound together with OpenRouter's own tools."
        raise UnboundedCost(message, param="tools")
    drivers.patch["tools"] = [*outgoing]
    _end_the_loop(body, drivers)


def _read_tool(endpoint: str, tool: Json, drivers: CostDrivers) -> dict[str, Json]:
    """The tool as it goes out: a web search gets an engine with a known price where the client names none."""
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
        return _read_server_tool(kind, tool, drivers)
    if endpoint == "responses":
        return _read_responses_tool(kind, tool, drivers)
    if endpoint == "messages":
        return _read_anthropic_tool(kind, tool, drivers)
    raise _no_bound(kind)


def _read_server_tool(kind: str, tool: dict[str, Json], drivers: CostDrivers) -> dict[str, Json]:
    if kind == "openrouter:datetime":
        drivers.tool_steps += 1
        return tool
    if kind != "openrouter:web_search":
        raise _no_bound(kind)
    return {**tool, "parameters": _read_search_tool(object_of(tool.get("parameters"), "tools"), drivers)}


def _read_responses_tool(kind: str, tool: dict[str, Json], drivers: CostDrivers) -> dict[str, Json]:
    if kind in SEARCH_TOOLS:
        # OpenRouter's form of the tool has its settings in `parameters`, and they may come first.
        if tool.get("parameters") is not None:
            message = f"The settings of {kind!r} stand beside its `type`, and not in `parameters`."
            raise UnboundedCost(message, param="tools")
        return _read_search_tool(tool, drivers)
    if kind != "namespace":
        raise _no_bound(kind)
    members = list_of(tool, "tools", "tools.")
    drivers.allowance += TOOL_TOKENS * len(members)
    for member in members:
        if not isinstance(member, dict) or member.get("type") not in ("function", "custom"):
            raise _no_bound("namespace")
    return tool


def _read_anthropic_tool(kind: str, tool: dict[str, Json], drivers: CostDrivers) -> dict[str, Json]:
    if kind == ANTHROPIC_SEARCH:
        drivers.native_turns = NATIVE_TURNS
        return _read_search_tool(tool, drivers, has_engine=False)
    if not ANTHROPIC_TOOLS.fullmatch(kind):
        raise _no_bound(kind)
    drivers.allowance += ANTHROPIC_TOOL_TOKENS
    return tool


def _read_search_tool(
    settings: dict[str, Json], drivers: CostDrivers, *, has_engine: bool = True
) -> dict[str, Json]:
    uses = integer(settings, "max_uses", MAX_TOOL_STEPS, "tools.")
    if uses is None:  # as most clients send it, who know of no bound
        uses = DEFAULT_SEARCHES
        settings = {**settings, "max_uses": uses}
    results = integer(settings, "max_results", MAX_SEARCH_RESULTS, "tools.") or DEFAULT_SEARCH_RESULTS
    drivers.tool_searches += uses
    drivers.tool_results = max(drivers.tool_results, results)
    drivers.tool_steps += uses
    return {**settings, "engine": _engine(settings.get("engine"), "tools")} if has_engine else settings


def _end_the_loop(body: JsonObject, drivers: CostDrivers) -> None:
    """Holds the loop to so many steps, or the client's own fewer.

    Any condition of `stop_server_tools_when` ends it, and then `max_tool_calls` is ignored; hence both are
    set. Source: https://openrouter.ai/docs/guides/features/server-tools#tool-call-limits
    """
    param = "stop_server_tools_when"
    conditions = [object_of(condition, param) for condition in list_of(body, param)]
    limits = [integer(body, "max_tool_calls"), *(_read_condition(each, drivers) for each in conditions)]
    steps = min(drivers.tool_steps, MAX_TOOL_STEPS, *(limit for limit in limits if limit is not None))
    drivers.tool_steps = steps
    drivers.patch[param] = [*conditions, {"type": "step_count_is", "step_count": steps}]
    if body.get("max_tool_calls") is not None:
        drivers.patch["max_tool_calls"] = steps


def _read_condition(condition: JsonObject, drivers: CostDrivers) -> int | None:
    """The steps after which a client's condition ends the loop, None for one of another kind. A cost goes
    into `tool_cost`.
    """
    param = "stop_server_tools_when"
    if condition.get("type") == "step_count_is":
        return integer(condition, "step_count", None, f"{param}.")
    if condition.get("type") == "max_cost":
        cost = price_of(condition.get("max_cost_in_dollars"), param).scaleb(9, EXACT)
        drivers.tool_cost = cost if drivers.tool_cost is None else min(drivers.tool_cost, cost)
    return None


def _no_bound(kind: Json) -> UnboundedCost:
    name = repr(str(kind)[:40])
    message = f"A tool of type {name} has no bound here. These have one: function tools and web searches."
    return UnboundedCost(message, param="tools")


def _engine(value: Json, param: str) -> str:
    return "exa" if value in (None, "auto") else choice_of(value, SEARCH_ENGINES, "A search engine", param)


def read_plugins(body: JsonObject, drivers: CostDrivers, suffixes: set[str]) -> None:
    """The plugins of a body, the search that `:online` stands for, and the parser that files need."""
    for plugin in [object_of(plugin, "plugins") for plugin in list_of(body, "plugins")]:
        if plugin.get("id") == "auto-router":
            drivers.routing = plugin
        else:
            is_off = plugin.get("enabled") is False
            drivers.plugins.append(plugin if is_off else _read_plugin(plugin, drivers))
    if "online" in suffixes and not drivers.search_results:
        drivers.plugins.append(_read_search({"id": "web"}, drivers))
    if drivers.search_results:
        drivers.patch["plugins"] = drivers.plugins
    if drivers.has_files and drivers.pdf_engine is None:
        raise UnboundedCost(NO_PARSER, param="plugins")


def _read_plugin(plugin: dict[str, Json], drivers: CostDrivers) -> dict[str, Json]:
    """The plugin as it goes out: a web search without an engine gets one that searches once."""
    kind = plugin.get("id")
    if kind == "web":
        return _read_search(plugin, drivers)
    if kind == "file-parser":
        engine = object_of(plugin.get("pdf"), "plugins").get("engine")
        drivers.pdf_engine = choice_of(engine, PDF_ENGINES, "A PDF engine", "plugins")
    elif not isinstance(kind, str) or kind not in HARMLESS_PLUGINS:
        raise UnboundedCost("One of the plugins has no bound.", param="plugins")
    return plugin


def _read_search(plugin: dict[str, Json], drivers: CostDrivers) -> dict[str, Json]:
    named = _engine(plugin.get("engine"), "plugins")
    if plugin.get("x_search") is not None:
        raise UnboundedCost("Searches on X are billed by the item, without a limit.", param="plugins")
    results = integer(plugin, "max_results", MAX_SEARCH_RESULTS, "plugins.") or DEFAULT_SEARCH_RESULTS
    drivers.search_results += results
    return {**plugin, "engine": named}
