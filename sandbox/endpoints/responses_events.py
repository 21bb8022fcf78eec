"""The stream of `/responses`: a numbered sequence of named events.

Shapes: https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from sandbox.planning import Plan

from .dialect import DONE, STREAM_ERRORS, Frame, sse
from .responses_items import OutputItem, output_items, status_of

RenderResponse: TypeAlias = Callable[[Plan, str, list[dict[str, object]]], dict[str, object]]


class ResponseEvents:
    """The events of one stream, numbered from 0."""

    def __init__(self, plan: Plan, render_response: RenderResponse) -> None:
        self._plan = plan
        self._render_response = render_response
        self._number = 0
        self._tokens = 0

    def frames(self) -> Iterator[Frame]:
        """All events, up to the scenario's failure."""
        plan, failure = self._plan, self._plan.behaviour.stream_error
        if failure and not plan.behaviour.after:
            yield self._failure(failure, [])
            return
        started = self._render_response(plan, "in_progress", [])
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        output: list[dict[str, object]] = []
        for index, item in enumerate(output_items(plan)):
            yield from self._item(item, index, cut=bool(failure))
            output.append(item.render(done=True))
        if failure:
            yield self._failure(failure, output)
        else:
            yield from self._end(output)

    def _end(self, output: list[dict[str, object]]) -> Iterator[Frame]:
        behaviour, status = self._plan.behaviour, status_of(self._plan.choices[0])
        self._tokens = self._plan.tokens.completion
        if behaviour.usage == "missing" and not behaviour.done:
            return
        yield self._event(f"response.{status}", response=self._render_response(self._plan, status, output))
        if behaviour.done:
            yield Frame(DONE, self._tokens)

    def _item(self, item: OutputItem, index: int, *, cut: bool) -> Iterator[Frame]:
        """The events of one item, up to its last delta where the stream fails in it."""
        names = _names_of(item)
        yield self._event("response.output_item.added", output_index=index, item=item.render(done=False))
        position: dict[str, object] = {"output_index": index, "item_id": item.id}
        if names.index:
            position[names.index] = 0
        if names.opened:
            yield self._event(names.opened, **position, part=item.part(""))
        yield from self._deltas(item, names.delta, position)
        if not cut:
            yield from self._item_end(item, names, position)

    def _deltas(self, item: OutputItem, name: str, position: Mapping[str, object]) -> Iterator[Frame]:
        self._tokens += item.tool.name_tokens if item.tool else 0
        # Hidden reasoning is billed all the same, so the item that follows it counts it.
        if not self._plan.shows_thoughts:
            self._tokens += len(self._plan.choices[0].thoughts)
        for text, added in item.deltas:
            self._tokens += added
            yield self._event(name, **position, delta=text, **_logprobs(item))

    def _item_end(
        self, item: OutputItem, names: _EventNames, position: Mapping[str, object]
    ) -> Iterator[Frame]:
        if item.tool:
            yield self._event(names.finished, **position, arguments=item.text, name=item.tool.name)
        else:
            yield self._event(names.finished, **position, text=item.text, **_logprobs(item))
        if names.closed:
            yield self._event(names.closed, **position, part=item.part(item.text))
        index = position["output_index"]
        yield self._event("response.output_item.done", output_index=index, item=item.render(done=True))

    def _failure(self, form: str, output: list[dict[str, object]]) -> Frame:
        error = STREAM_ERRORS[form]
        if form == "string":
            return self._event("error", code=error["code"], message=error["message"], param=None)
        if form == "empty":
            return self._event("response.error", error=error)
        failed = self._render_response(self._plan, "failed", output)
        code = "rate_limit_exceeded"
        response = {**failed, "error": {"code": code, "message": error["message"]}}
        return self._event("response.failed", response={**response, "error_type": code, "usage": None})

    def _event(self, kind: str, **fields: object) -> Frame:
        data = sse(kind, {"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return Frame(data, self._tokens)


def _logprobs(item: OutputItem) -> dict[str, object]:
    return {"logprobs": []} if item.kind == "message" else {}


@dataclass(frozen=True, slots=True)
class _EventNames:
    """The events that open a part, add to it, complete its text and close it; the name of its index."""

    opened: str
    delta: str
    finished: str
    closed: str
    index: str


def _names_of(item: OutputItem) -> _EventNames:
    return _NAMES["raw_reasoning" if item.kind == "reasoning" and not item.is_summary else item.kind]


# https://platform.openai.com/docs/api-reference/responses-streaming. Arguments of a function are not in a
# part.
_NAMES = {
    "message": _EventNames(
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "content_index",
    ),
    "reasoning": _EventNames(
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "summary_index",
    ),
    "raw_reasoning": _EventNames(
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "content_index",
    ),
    "function_call": _EventNames(
        "",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "",
        "",
    ),
}
