"""`/responses`: OpenAI's response object, with OpenRouter's usage.

Shapes: https://platform.openai.com/docs/api-reference/responses/object, and `OpenResponsesResult` of
OpenRouter's OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sandbox.planning import Body, Plan, RequestSettings, plan_completion

from .dialect import PROVIDER_DIED, TOO_LATE, Frame, JsonDialect, sse
from .responses_events import ResponseEvents
from .responses_input import read_response_request
from .responses_items import output_items, status_of
from .usage import render_response_usage

# Fields of the request that the response repeats, and their values where the request has none.
_ECHOED: Mapping[str, object] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": None,
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": None,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}

_UNUSED: Mapping[str, object] = {
    "store": False,
    "background": False,
    "service_tier": "auto",
    "presence_penalty": None,
    "frequency_penalty": None,
}


def plan_response(body: Body, settings: RequestSettings) -> tuple[Plan, Responses]:
    """Plans a response; raises Refusal."""
    return plan_completion(read_response_request(body), settings), Responses(body)


class Responses(JsonDialect):
    """`/responses`. Stateless as OpenRouter's is: nothing is stored."""

    farewell = sse(
        "error",
        {
            "type": "error",
            "code": "server_error",
            "message": TOO_LATE["message"],
            "param": None,
            "sequence_number": 0,
        },
    )

    def __init__(self, body: Body) -> None:
        self._echo = {
            name: default if body.get(name) is None else body[name] for name, default in _ECHOED.items()
        }

    def render(self, plan: Plan) -> Mapping[str, object]:
        items = [item.render(done=True) for item in output_items(plan)]
        return self.response(plan, status_of(plan.choices[0]), items)

    def render_error(self, error: Mapping[str, object]) -> Mapping[str, object]:
        return {"status": "failed", "error": error}

    def response(self, plan: Plan, status: str, output: list[dict[str, object]]) -> dict[str, object]:
        """The response object with this status. Its usage is known once it has ended."""
        has_ended, created = status != "in_progress", plan.generation.created
        has_usage = has_ended and plan.behaviour.usage != "missing"
        return {
            "id": f"resp_{plan.id[-24:]}",
            "object": "response",
            "created_at": created,
            "completed_at": created if status == "completed" else None,
            "status": status,
            "model": plan.model.id,
            "error": _server_error(PROVIDER_DIED) if status == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            **_UNUSED,
            **self._echo,
            "usage": render_response_usage(plan, plan.tokens) if has_usage else None,
        }

    def frames(self, plan: Plan) -> Iterator[Frame]:
        return ResponseEvents(plan, self.response).frames()


def _server_error(error: Mapping[str, object]) -> dict[str, object]:
    return {"code": "server_error", "message": error["message"]}
