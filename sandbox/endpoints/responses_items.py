"""The output items of `/responses`: reasoning, message and function call.

Shapes: https://platform.openai.com/docs/api-reference/responses/object#responses/object-output
"""

from __future__ import annotations

from sandbox.content import Choice
from sandbox.planning import Plan

from .dialect import fragments


class OutputItem:
    """One output item, and the deltas of which it is made."""

    def __init__(self, plan: Plan, choice: Choice, kind: str) -> None:
        self.kind = kind
        self.id = f"{_PREFIXES[kind]}_{plan.id[-24:]}"
        self._choice = choice
        self._status = "incomplete" if choice.finish in ("length", "error") else "completed"
        # OpenAI's models show a summary of their reasoning, others the reasoning itself.
        self.is_summary = plan.model.id.startswith("openai/")
        self.tool = choice.tool if kind == "function_call" else None

    @property
    def deltas(self) -> list[tuple[str, int]]:
        """Texts, and the number of tokens that each adds."""
        if self.kind == "reasoning":
            return [(thought, 1) for thought in self._choice.thoughts]
        if self.kind == "message":
            return [(piece, 1) for piece in self._choice.pieces]
        return list(fragments(self._choice.pieces))

    @property
    def text(self) -> str:
        return self._choice.thinking if self.kind == "reasoning" else self._choice.text

    def part(self, text: str) -> dict[str, object]:
        """The content part with this text."""
        if self.kind == "reasoning":
            return {"type": "summary_text" if self.is_summary else "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def render(self, *, done: bool) -> dict[str, object]:
        """The item as it is in the end, or as it is added."""
        if self.kind == "reasoning":
            return self._render_reasoning(done=done)
        status = self._status if done else "in_progress"
        if self.kind == "message":
            parts = [self.part(self.text)] if done else []
            return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": parts}
        call = {"call_id": self.tool.id, "name": self.tool.name} if self.tool else {}
        arguments = self.text if done else ""
        return {"id": self.id, "type": "function_call", **call, "arguments": arguments, "status": status}

    def _render_reasoning(self, *, done: bool) -> dict[str, object]:
        parts = [self.part(self.text)] if done else []
        texts = {"summary": parts} if self.is_summary else {"summary": [], "content": parts}
        return {"id": self.id, "type": "reasoning", **texts, "encrypted_content": None}


# The beginnings of ids, as in OpenAI's responses.
_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


def output_items(plan: Plan) -> list[OutputItem]:
    """The items of a response: reasoning, then a message or a function call."""
    choice = plan.choices[0]
    reasoning = ["reasoning"] if choice.thoughts and plan.shows_thoughts else []
    output = ["function_call" if choice.tool else "message"] if choice.pieces or choice.tool else []
    return [OutputItem(plan, choice, kind) for kind in (*reasoning, *output)]


def status_of(choice: Choice) -> str:
    """The status of a response that has ended."""
    return {"length": "incomplete", "error": "failed"}.get(choice.finish, "completed")
