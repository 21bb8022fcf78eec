"""Plans chat and text completions, and streams them: one server-sent event per token.

The usage comes in the last event, in one of three shapes that OpenRouter has been seen to send.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sandbox.failures import invalid_request, refusal
from sandbox.planning import Body, Plan, RequestSettings, plan_completion
from sandbox.request_fields import require_role
from sandbox.wire import dumps

from .chat import ChatFormat, ChoiceFormat, TextFormat, render_whole
from .dialect import DONE, STREAM_ERRORS, Frame, JsonDialect
from .usage import render_usage

ROLES = ("system", "developer", "user", "assistant", "tool")


def plan_chat(body: Body, settings: RequestSettings) -> tuple[Plan, Completions]:
    """Plans a chat completion; raises Refusal."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise refusal(400, 'Input required: specify "prompt" or "messages"')
    for index, message in enumerate(messages):
        _require_message(message, f"messages.{index}")
    return plan_completion(body, settings), Completions(ChatFormat())


def plan_text(body: Body, settings: RequestSettings) -> tuple[Plan, Completions]:
    """Plans a legacy text completion; raises Refusal."""
    if not isinstance(body.get("prompt"), str | list) or not body["prompt"]:
        raise refusal(400, 'Input required: specify "prompt" or "messages"')
    return plan_completion(body, settings), Completions(TextFormat())


def _require_message(message: object, path: str) -> None:
    if not isinstance(message, Mapping):
        raise invalid_request(f"{path}: Invalid input: expected object")
    require_role(message, ROLES, path)
    if not isinstance(message.get("content"), str | list | None):
        raise invalid_request(f"{path}.content: Invalid input: expected string or array")


class Completions(JsonDialect):
    """`/chat/completions` and `/completions`."""

    def __init__(self, choice_format: ChoiceFormat) -> None:
        self._format = choice_format

    def render(self, plan: Plan) -> Mapping[str, object]:
        return render_whole(plan, self._format)

    def frames(self, plan: Plan) -> Iterator[Frame]:
        writer = _Writer(plan, self._format)
        yield from writer.content()
        if plan.behaviour.stream_error:
            yield Frame(writer.error(plan.behaviour.stream_error), writer.tokens)
            if plan.behaviour.stream_error == "string":
                yield Frame(DONE, writer.tokens)
            return
        yield from (Frame(data, writer.tokens) for data in writer.ending())


class _Writer:
    """Writes the events of one stream, and counts the tokens that they carry."""

    def __init__(self, plan: Plan, choice_format: ChoiceFormat) -> None:
        self.tokens = 0
        self._plan = plan
        self._format = choice_format
        head = {
            "id": plan.id,
            "object": choice_format.chunk,
            "created": plan.generation.created,
            "model": plan.model.id,
            "provider": plan.route.endpoint.provider,
        }
        # All events begin alike, so that their beginning is written once.
        self._head = b"data: " + dumps(head)[:-1]
        self._counts_along = plan.behaviour.usage == "every-event"

    def content(self) -> Iterator[Frame]:
        for choice in self._plan.choices:
            for delta, added in self._format.deltas(self._plan, choice):
                self.tokens += added
                yield Frame(self._event(delta), self.tokens)
            if not self._plan.behaviour.stream_error:
                end = self._format.end(self._plan, choice, choice.finish)
                yield Frame(self._event(dumps(end)), self.tokens)

    def ending(self) -> Iterator[bytes]:
        behaviour = self._plan.behaviour
        if behaviour.usage not in ("missing", "every-event"):
            for _ in range(2 if behaviour.usage == "twice" else 1):
                yield self._usage_event()
        if behaviour.done:
            yield DONE

    def error(self, form: str) -> bytes:
        # https://openrouter.ai/docs/api-reference/streaming: the error comes with finish_reason "error".
        end = self._format.end(self._plan, self._plan.choices[0], "error")
        choices = [] if form == "empty" else [end]
        return self._finish(b',"error":' + dumps(STREAM_ERRORS[form]) + b',"choices":' + dumps(choices))

    def _event(self, choice: bytes) -> bytes:
        usage = b""
        if self._counts_along:
            usage = b',"usage":' + dumps(render_usage(self._plan, self._plan.running(self.tokens)))
        return self._finish(b',"choices":[' + choice + b"]" + usage)

    def _usage_event(self) -> bytes:
        plan, last = self._plan, self._plan.choices[-1]
        shape = plan.behaviour.usage
        finish = None if shape == "null-finish" else last.finish
        choices = dumps([] if shape == "empty-choices" else [self._format.end(plan, last, finish)])
        usage = dumps(render_usage(plan, plan.tokens))
        return self._finish(b',"service_tier":null,"choices":' + choices + b',"usage":' + usage)

    def _finish(self, fields: bytes) -> bytes:
        return self._head + fields + b"}\n\n"
