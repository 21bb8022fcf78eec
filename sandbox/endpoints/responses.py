"""/responses. OpenAI's response object and its sequence of events, with OpenRouter's usage.

Shapes: https://platform.openai.com/docs/api-reference/responses-streaming, OpenRouter's
`OpenResponsesResult`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sandbox.content import Choice
from sandbox.planning import Ask, Body, Plan, plan_completion

from .chat import FRAGMENT_TOKENS
from .dialect import DONE, PROVIDER_DIED, STREAM_ERRORS, TOO_LATE, Frame, Whole, sse
from .responses_input import read_response_request
from .usage import render_response_usage

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


def answer_response(body: Body, ask: Ask) -> tuple[Plan, Responses]:
    """Plan a response; raises Refusal."""
    return plan_completion(read_response_request(body), ask), Responses(body)


class Responses(Whole):
    """`/responses`. Stateless, as OpenRouter's: nothing is stored."""

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
        items = [item.render(done=True) for item in _items(plan)]
        return self.response(plan, _status(plan.choices[0]), items)

    def render_error(self, error: Mapping[str, object]) -> Mapping[str, object]:
        return {"status": "failed", "error": error}

    def response(self, plan: Plan, status: str, output: list[dict[str, object]]) -> dict[str, object]:
        """The response object in this state; usage is known once it has ended."""
        over, created = status != "in_progress", plan.generation.created
        told = over and plan.behaviour.usage != "missing"
        return {
            "id": f"resp_{plan.id[-24:]}",
            "object": "response",
            "created_at": created,
            "completed_at": created if status == "completed" else None,
            "status": status,
            "model": plan.model.id,
            "error": _error_of(PROVIDER_DIED) if status == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "store": False,
            "background": False,
            "service_tier": "auto",
            "presence_penalty": None,
            "frequency_penalty": None,
            **self._echo,
            "usage": render_response_usage(plan, plan.tokens) if told else None,
        }

    def frames(self, plan: Plan) -> Iterator[Frame]:
        return _Events(plan, self).frames()


class _Item:
    """One output item and the deltas that make it up."""

    def __init__(self, plan: Plan, choice: Choice, kind: str) -> None:
        self.kind = kind
        self.id = f"{_PREFIXES[kind]}_{plan.id[-24:]}"
        self._choice = choice
        self._status = "incomplete" if choice.finish in ("length", "error") else "completed"
        self.summarised = plan.model.id.startswith("openai/")
        self.tool = choice.tool if kind == "function_call" else None

    @property
    def deltas(self) -> list[tuple[str, int]]:
        """Texts and the tokens that each adds."""
        if self.kind == "reasoning":
            return [(thought, 1) for thought in self._choice.thoughts]
        if self.kind == "message":
            return [(piece, 1) for piece in self._choice.pieces]
        pieces = self._choice.pieces
        groups = [pieces[start : start + FRAGMENT_TOKENS] for start in range(0, len(pieces), FRAGMENT_TOKENS)]
        return [("".join(group), len(group)) for group in groups]

    @property
    def text(self) -> str:
        return self._choice.thinking if self.kind == "reasoning" else self._choice.text

    def part(self, text: str) -> dict[str, object]:
        """The content part, holding this text."""
        if self.kind == "reasoning":
            return {"type": "summary_text" if self.summarised else "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def render(self, *, done: bool) -> dict[str, object]:
        """The item as it is added, or as it is in the end."""
        parts = [self.part(self.text)] if done else []
        if self.kind == "reasoning":
            shown = {"summary": parts} if self.summarised else {"summary": [], "content": parts}
            return {"id": self.id, "type": "reasoning", **shown, "encrypted_content": None}
        status = self._status if done else "in_progress"
        if self.kind == "message":
            return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": parts}
        called = {"call_id": self.tool.id, "name": self.tool.name} if self.tool else {}
        arguments = self.text if done else ""
        return {"id": self.id, "type": "function_call", **called, "arguments": arguments, "status": status}


_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


def _items(plan: Plan) -> list[_Item]:
    choice, kinds = plan.choices[0], []
    if choice.thoughts and plan.shows_thoughts:
        kinds.append("reasoning")
    if choice.pieces or choice.tool:
        kinds.append("function_call" if choice.tool else "message")
    return [_Item(plan, choice, kind) for kind in kinds]


def _status(choice: Choice) -> str:
    return {"length": "incomplete", "error": "failed"}.get(choice.finish, "completed")


def _error_of(error: Mapping[str, object]) -> dict[str, object]:
    return {"code": "server_error", "message": error["message"]}


class _Events:
    """The events of one stream, numbered."""

    def __init__(self, plan: Plan, dialect: Responses) -> None:
        self._plan = plan
        self._dialect = dialect
        self._number = 0
        self._tokens = 0

    def frames(self) -> Iterator[Frame]:
        plan, failure = self._plan, self._plan.behaviour.stream_error
        if failure and not plan.behaviour.after:
            yield self._failure(failure, [])
            return
        started = self._dialect.response(plan, "in_progress", [])
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        output: list[dict[str, object]] = []
        for place, item in enumerate(_items(plan)):
            yield from self._item(item, place, cut=bool(failure))
            output.append(item.render(done=True))
        if failure:
            yield self._failure(failure, output)
            return
        yield from self._end(output)

    def _end(self, output: list[dict[str, object]]) -> Iterator[Frame]:
        behaviour, status = self._plan.behaviour, _status(self._plan.choices[0])
        self._tokens = self._plan.tokens.completion
        if behaviour.usage == "missing" and not behaviour.done:
            return
        yield self._event(f"response.{status}", response=self._dialect.response(self._plan, status, output))
        if behaviour.done:
            yield Frame(DONE, self._tokens)

    def _item(self, item: _Item, place: int, *, cut: bool) -> Iterator[Frame]:
        """One item from its addition to its end; to its last delta where the stream fails in it."""
        where = {"output_index": place, "item_id": item.id}
        yield self._event("response.output_item.added", output_index=place, item=item.render(done=False))
        opened, delta, finished, closed, index = _NAMES[
            item.kind if item.summarised or item.kind != "reasoning" else "raw"
        ]
        spot = {**where, index: 0} if index else where
        if opened:
            yield self._event(opened, **spot, part=item.part(""))
        logprobs: dict[str, object] = {"logprobs": []} if item.kind == "message" else {}
        self._tokens += item.tool.lead if item.tool else 0
        if not self._plan.shows_thoughts:
            self._tokens += len(self._plan.choices[0].thoughts)
        for text, added in item.deltas:
            self._tokens += added
            yield self._event(delta, **spot, delta=text, **logprobs)
        if cut:
            return
        said = (
            {"arguments": item.text, "name": item.tool.name} if item.tool else {"text": item.text, **logprobs}
        )
        yield self._event(finished, **spot, **said)
        if closed:
            yield self._event(closed, **spot, part=item.part(item.text))
        yield self._event("response.output_item.done", output_index=place, item=item.render(done=True))

    def _failure(self, form: str, output: list[dict[str, object]]) -> Frame:
        error = STREAM_ERRORS[form]
        if form == "string":
            return self._event("error", code=error["code"], message=error["message"], param=None)
        if form == "empty":
            return self._event("response.error", error=error)
        failed = self._dialect.response(self._plan, "failed", output)
        told = {"code": "rate_limit_exceeded", "message": error["message"]}
        return self._event(
            "response.failed", response={**failed, "error": told, "error_type": told["code"], "usage": None}
        )

    def _event(self, kind: str, **fields: object) -> Frame:
        data = sse(kind, {"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return Frame(data, self._tokens)


_NAMES = {
    # the events that open a part, add to it, complete its text and close it, and what they call its place
    "message": (
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "content_index",
    ),
    "reasoning": (
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
        "summary_index",
    ),
    "raw": (
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "content_index",
    ),
    "function_call": (
        "",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "",
        "",
    ),
}
