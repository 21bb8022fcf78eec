"""The proxy's operations in the OpenAPI document: an example of each, and every status that they may have."""

from __future__ import annotations

from typing import Any

from models import ERROR_SCHEMA

ERRORS = {
    "400": "The request is not valid; `error.param` names the field",
    "401": "The API key is missing, unknown, revoked or expired",
    "402": "The credits or the key's budget do not cover the upper bound of this request's cost",
    "403": "The key's scopes or restrictions do not allow this",
    "404": "The model does not exist",
    "413": "The body is too large",
    "429": "A rate, plan or concurrency limit is reached; `Retry-After` says when to come back",
    "502": "The model provider failed",
    "503": "The model provider or the gateway's database cannot serve now",
    "504": "The model provider did not answer in time",
}

ANTHROPIC_ERROR: dict[str, Any] = {
    "schema": {
        "type": "object",
        "required": ["type", "error", "request_id"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {
                    "type": {"type": "string"},
                    "message": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "string"},
                },
                "additionalProperties": True,
            },
            "request_id": {"type": "string"},
        },
    },
    "example": {
        "type": "error",
        "error": {
            "type": "billing_error",
            "message": "Your credits do not cover ...",
            "param": None,
            "code": "insufficient_credits",
        },
        "request_id": "0199f0a0-0000-7000-8000-000000000000",
    },
}

OPENROUTER_ERROR: dict[str, Any] = {
    "title": "OpenRouterErrorBody",
    "description": "Every error under `/api/v1`, except those of Anthropic's endpoint.",
    "type": "object",
    "required": ["error", "gateway"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "metadata", "type", "param"],
            "properties": {
                "code": {"type": "integer", "minimum": 400, "maximum": 599},
                "message": {"type": "string"},
                "metadata": {
                    "type": "object",
                    "required": ["error_type"],
                    "properties": {"error_type": {"type": "string"}},
                },
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
            },
        },
        "gateway": {"type": "object"},
    },
    "examples": [
        {
            "error": {
                "code": 402,
                "message": "Your credits do not cover ...",
                "metadata": {"error_type": "insufficient_credits"},
                "type": "insufficient_quota",
                "param": None,
            },
            "gateway": {"request_id": "0199f0a0-0000-7000-8000-000000000000"},
        }
    ],
}

CHARGE = {
    "request_id": "0199f0a0-0000-7000-8000-000000000000",
    "tokens_charged": 21,
    "cost": 0.0000063,
    "user_balance_after": 9.9999937,
}
USAGE = {"prompt_tokens": 12, "completion_tokens": 9, "total_tokens": 21, "cost": 0.0000063}
CHARGED = (
    "The response carries `gateway_usage` (request_id, tokens_charged, cost, user_balance_after), in a "
    "stream within the event that reports the usage. With `x-sandbox-scenario` the sandbox plays a failure."
)
TEXT, OBJECT, WHOLE = {"type": "string"}, {"type": "object"}, {"type": "integer", "minimum": 1}
STREAM = {"type": "boolean", "default": False}
MODEL = "openai/gpt-4o-mini"
HELLO = [{"role": "user", "content": "Say hello."}]
FILE = {"type": "string", "format": "binary", "description": "The audio file"}


def _operation(
    name: str,
    summary: str,
    description: str,
    *,
    fields: dict[str, Any],
    required: list[str],
    example: dict[str, Any],
    response: dict[str, Any] | None,
    form: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One operation. `response` is an example, None for bytes; `form` the fields of a multipart form."""
    schema = {"type": "object", "required": required, "properties": fields, "additionalProperties": True}
    content: dict[str, Any] = {"application/json": {"schema": schema, "example": example}}
    if form is not None:
        content["multipart/form-data"] = {
            "schema": {"type": "object", "required": ["file", "model"], "properties": form}
        }
    return {
        "tags": ["proxy"],
        "summary": summary,
        "description": description if response is None else f"{description} {CHARGED}",
        "operationId": f"create_{name.replace('/', '_')}",
        "security": [{"bearer": []}, {"APIKeyHeader": []}],
        "requestBody": {"required": True, "content": content},
        "responses": {"200": _response(response, streams="stream" in fields), **_errors(name)},
    }


def _errors(name: str) -> dict[str, Any]:
    content = {"application/json": ANTHROPIC_ERROR if name == "messages" else ERROR_SCHEMA}
    return {status: {"description": text, "content": content} for status, text in ERRORS.items()}


def _response(example: dict[str, Any] | None, *, streams: bool) -> dict[str, Any]:
    if example is None:
        audio = {"schema": {"type": "string", "format": "binary"}}
        return {"description": "The audio, as it is made", "content": {"audio/*": audio}}
    body = {"schema": OBJECT, "example": {**example, "gateway_usage": CHARGE}}
    content: dict[str, Any] = {"application/json": body}
    if streams:
        content["text/event-stream"] = {"schema": TEXT}
    streamed = ", or server-sent events with `stream: true`" if streams else ""
    return {"description": f"The response{streamed}", "content": content}


OPERATIONS = {
    "chat/completions": _operation(
        "chat/completions",
        "A chat completion, plain or streamed",
        "OpenAI's and OpenRouter's request and response, passed through; every field reaches the model.",
        fields={
            "model": TEXT,
            "messages": {"type": "array", "minItems": 1, "items": OBJECT},
            "stream": STREAM,
            "max_tokens": WHOLE,
        },
        required=["model", "messages"],
        example={"model": MODEL, "messages": HELLO},
        response={
            "id": "gen-1790000000-abc",
            "object": "chat.completion",
            "model": MODEL,
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello."}}
            ],
            "usage": USAGE,
        },
    ),
    "completions": _operation(
        "completions",
        "A text completion, plain or streamed",
        "OpenAI's older completions.",
        fields={
            "model": TEXT,
            "prompt": {"type": ["string", "array"]},
            "stream": STREAM,
            "max_tokens": WHOLE,
        },
        required=["model", "prompt"],
        example={"model": MODEL, "prompt": "Once upon a time", "max_tokens": 20},
        response={
            "id": "gen-1790000000-abc",
            "object": "text_completion",
            "model": MODEL,
            "choices": [{"index": 0, "finish_reason": "length", "text": " there was"}],
            "usage": USAGE,
        },
    ),
    "embeddings": _operation(
        "embeddings",
        "Embeddings of texts",
        "One vector for each input; never streamed.",
        fields={
            "model": TEXT,
            "input": {"type": ["string", "array"]},
            "dimensions": WHOLE,
            "encoding_format": TEXT,
        },
        required=["model", "input"],
        example={"model": "openai/text-embedding-3-small", "input": "Hello."},
        response={
            "object": "list",
            "model": "openai/text-embedding-3-small",
            "data": [{"object": "embedding", "index": 0, "embedding": [0.1, -0.2]}],
            "usage": {"prompt_tokens": 3, "total_tokens": 3, "cost": 0.00000006},
        },
    ),
    "responses": _operation(
        "responses",
        "A response, plain or streamed",
        "OpenAI's Responses. Nothing is stored: `store` is ignored; `previous_response_id`, `conversation` "
        "and `background` are refused.",
        fields={
            "model": TEXT,
            "input": {"type": ["string", "array"]},
            "stream": STREAM,
            "max_output_tokens": WHOLE,
        },
        required=["model", "input"],
        example={"model": MODEL, "input": "Say hello.", "max_output_tokens": 50},
        response={
            "id": "gen-1790000000-abc",
            "object": "response",
            "status": "completed",
            "model": MODEL,
            "output": [
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Hello."}],
                }
            ],
            "usage": {"input_tokens": 12, "output_tokens": 9, "total_tokens": 21, "cost": 0.0000063},
        },
    ),
    "messages": _operation(
        "messages",
        "A message, plain or streamed",
        "Anthropic's Messages, for any model; its SDKs take the base URL without `/v1`. Errors have "
        "Anthropic's form.",
        fields={
            "model": TEXT,
            "max_tokens": WHOLE,
            "messages": {"type": "array", "minItems": 1, "items": OBJECT},
            "system": {"type": ["string", "array"]},
            "stream": STREAM,
        },
        required=["model", "messages", "max_tokens"],
        example={"model": "anthropic/claude-haiku-4.5", "max_tokens": 50, "messages": HELLO},
        response={
            "id": "gen-1790000000-abc",
            "type": "message",
            "role": "assistant",
            "model": "anthropic/claude-haiku-4.5",
            "content": [{"type": "text", "text": "Hello."}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 12, "output_tokens": 9},
        },
    ),
    "rerank": _operation(
        "rerank",
        "Documents in order of relevance",
        "A score for each document; never streamed.",
        fields={"model": TEXT, "query": TEXT, "documents": {"type": "array", "minItems": 1}, "top_n": WHOLE},
        required=["model", "query", "documents"],
        example={"model": "cohere/rerank-v3.5", "query": "greetings", "documents": ["Hello.", "Goodbye."]},
        response={
            "id": "gen-rerank-1790000000-abc",
            "model": "cohere/rerank-v3.5",
            "results": [{"index": 0, "relevance_score": 0.98, "document": {"text": "Hello."}}],
            "usage": {"search_units": 1, "total_tokens": 8, "cost": 0.002},
        },
    ),
    "images": _operation(
        "images",
        "Images from a text",
        "Also at `/v1/images/generations`, where OpenAI's clients expect it.",
        fields={"model": TEXT, "prompt": TEXT, "n": WHOLE, "size": TEXT},
        required=["model", "prompt"],
        example={"model": "google/gemini-2.5-flash-image", "prompt": "A lighthouse at dawn"},
        response={"created": 1790000000, "data": [{"b64_json": "iVBORw0KGgo="}], "usage": USAGE},
    ),
    "audio/speech": _operation(
        "audio/speech",
        "Speech from a text",
        "Audio, passed on as it is made. Its cost is in the usage records, and in `x-gateway-cost` where it "
        "comes in one piece.",
        fields={"model": TEXT, "input": TEXT, "voice": TEXT, "response_format": TEXT},
        required=["model", "input", "voice"],
        example={"model": "openai/gpt-4o-mini-tts", "input": "Hello.", "voice": "alloy"},
        response=None,
    ),
    "audio/transcriptions": _operation(
        "audio/transcriptions",
        "The text of an audio file",
        "OpenAI's form with a `file`, or OpenRouter's JSON with `input_audio`.",
        fields={
            "model": TEXT,
            "input_audio": OBJECT,
            "language": TEXT,
            "response_format": {"enum": ["json", "verbose_json"]},
        },
        required=["model", "input_audio"],
        example={"model": "openai/whisper-1", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        response={"text": "Hello.", "usage": {"seconds": 1.5, "cost": 0.00015}},
        form={
            "file": FILE,
            "model": TEXT,
            "language": TEXT,
            "temperature": TEXT,
            "response_format": {"enum": ["json", "verbose_json"]},
        },
    ),
}
OPERATIONS["images/generations"] = {**OPERATIONS["images"], "operationId": "create_images_generations"}
