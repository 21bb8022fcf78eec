"""Their events. One server-sent event per token, three usage shapes, errors in mid-stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sandbox.failures import refusal
from sandbox.planning import Ask, Body, Plan, plan_completion
from sandbox.wire import dumps

from .chat import Chat, Text, Wording, render_whole
from .dialect import DONE, STREAM_ERRORS, Frame, Whole
from .usage import render_usage

ROLES = ("system", "developer", "user", "assistant", "tool")


def answer_chat(body: Body, ask: Ask) -> tuple[Plan, Choices]:
    """Plan a chat completion; raises Refusal."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise refusal(400, 'Input required: specify "prompt" or "messages"')
    for place, message in enumerate(messages):
        _require_message(message, place)
    return plan_completion(body, ask), Choices(Chat())


def answer_text(body: Body, ask: Ask) -> tuple[Plan, Choices]:
    """Plan a legacy text completion; raises Refusal."""
    if not isinstance(body.get("prompt"), str | list) or not body["prompt"]:
        raise refusal(400, 'Input required: specify "prompt" or "messages"')
    return plan_completion(body, ask), Choices(Text())


def _require_message(message: object, place: int) -> None:
    if not isinstance(message, Mapping):
        raise refusal(400, f"messages.{place}: Invalid input: expected object", error_type="invalid_request")
    if message.get("role") not in ROLES:
        allowed = "|".join(f'"{role}"' for role in ROLES)
        raise refusal(
            400,
            f"messages.{place}.role: Invalid option: expected one of {allowed}",
            error_type="invalid_request",
        )
    if not isinstance(message.get("content"), str | list | None):
        raise refusal(
            400,
            f"messages.{place}.content: Invalid input: expected string or array",
            error_type="invalid_request",
        )


class Choices(Whole):
    """Chat or text completions."""

    def __init__(self, wording: Wording) -> None:
        self._wording = wording

    def render(self, plan: Plan) -> Mapping[str, object]:
        return render_whole(plan, self._wording)

    def frames(self, plan: Plan) -> Iterator[Frame]:
        writer = _Writer(plan, self._wording)
        yield from writer.content()
        if plan.behaviour.stream_error:
            yield Frame(writer.error(plan.behaviour.stream_error), writer.tokens)
            if plan.behaviour.stream_error == "string":
                yield Frame(DONE, writer.tokens)
            return
        yield from (Frame(data, writer.tokens) for data in writer.ending())


class _Writer:
    def __init__(self, plan: Plan, wording: Wording) -> None:
        self.tokens = 0
        self._plan = plan
        self._wording = wording
        head = {
            "id": plan.id,
            "object": wording.chunk,
            "created": plan.generation.created,
            "model": plan.model.id,
            "provider": plan.route.endpoint.provider,
        }
        self._head = b"data: " + dumps(head)[:-1]
        self._counts_along = plan.behaviour.usage == "every-event"

    def content(self) -> Iterator[Frame]:
        for choice in self._plan.choices:
            for delta, added in self._wording.deltas(self._plan, choice):
                self.tokens += added
                yield Frame(self._event(delta), self.tokens)
            if not self._plan.behaviour.stream_error:
                end = self._wording.end(self._plan, choice, choice.finish)
                yield Frame(self._event(dumps(end)), self.tokens)

    def ending(self) -> Iterator[bytes]:
        behaviour = self._plan.behaviour
        if behaviour.usage not in ("missing", "every-event"):
            for _ in range(2 if behaviour.usage == "twice" else 1):
                yield self._usage_event()
        if behaviour.done:
            yield DONE

    def error(self, form: str) -> bytes:
        end = self._wording.end(self._plan, self._plan.choices[0], "error")
        choices = [] if form == "empty" else [end]
        return (
            self._head
            + b',"error":'
            + dumps(STREAM_ERRORS[form])
            + b',"choices":'
            + dumps(choices)
            + b"}\n\n"
        )

    def _event(self, choice: bytes) -> bytes:
        tail = b""
        if self._counts_along:
            tail = b',"usage":' + dumps(render_usage(self._plan, self._plan.running(self.tokens)))
        return self._head + b',"choices":[' + choice + b"]" + tail + b"}\n\n"

    def _usage_event(self) -> bytes:
        plan, last = self._plan, self._plan.choices[-1]
        shape = plan.behaviour.usage
        finish = None if shape == "null-finish" else last.finish
        choices = [] if shape == "empty-choices" else [self._wording.end(plan, last, finish)]
        usage = dumps(render_usage(plan, plan.tokens))
        return (
            self._head + b',"service_tier":null,"choices":' + dumps(choices) + b',"usage":' + usage + b"}\n\n"
        )
