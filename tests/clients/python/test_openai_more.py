"""The other endpoints of OpenAI's SDK for Python work unchanged: responses, embeddings, text completions,
images and audio.
"""

from __future__ import annotations

import base64
import io
import wave
from typing import Any

import openai
import pytest
from account import (
    EMBEDDER,
    IMAGE,
    LONG,
    MODEL,
    PROMPT,
    QUESTION,
    READ,
    UNKNOWN_MODEL,
    URL,
    WEATHER,
    WRONG_KEY,
    Account,
    assert_booked,
    assert_left,
    model_that_makes,
    new_account,
)
from openai.types.responses import FunctionToolParam, ResponseFunctionToolCall
from pydantic import BaseModel

TOOL: FunctionToolParam = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}

responses = pytest.mark.endpoint("POST /v1/responses")
embeddings = pytest.mark.endpoint("POST /v1/embeddings")
completions = pytest.mark.endpoint("POST /v1/completions")
images = pytest.mark.endpoint("POST /v1/images/generations")
speech = pytest.mark.endpoint("POST /v1/audio/speech")
transcriptions = pytest.mark.endpoint("POST /v1/audio/transcriptions")


def sdk(key: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{URL}/v1", api_key=key, **{"max_retries": 0, **options})


class Forecast(BaseModel):
    city: str
    degrees: int


@responses
def test_a_response_is_billed_as_told(account: Account) -> None:
    answer = sdk(account.key).responses.create(model=MODEL, input=PROMPT)
    assert answer.output_text.startswith(READ)
    assert (answer.status, answer.error) == ("completed", None)
    assert answer.usage is not None
    record = account.settled_record()
    told: Any = answer.usage
    assert_booked(record, prompt=told.input_tokens, completion=told.output_tokens, cost=told.cost)
    assert record["endpoint"] == "responses"


@responses
def test_a_streamed_response_ends_with_its_usage(account: Account) -> None:
    events = list(sdk(account.key).responses.create(model=MODEL, input=PROMPT, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text.startswith(READ)
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == text
    told: Any = last.response.usage
    record = account.settled_record()
    assert_booked(record, prompt=told.input_tokens, completion=told.output_tokens, cost=told.cost)
    assert record["streamed"] is True
    assert events[0].type == "response.created"
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)


@responses
def test_the_stream_helper_gathers_the_whole_response(account: Account) -> None:
    with sdk(account.key).responses.stream(model=MODEL, input=PROMPT) as stream:
        final = stream.get_final_response()
    assert final.output_text.startswith(READ)
    assert account.settled_record()["status"] == "completed"


@responses
def test_a_response_calls_a_tool_and_answers_its_result(account: Account) -> None:
    client = sdk(account.key)
    first = client.responses.create(model=MODEL, input=QUESTION, tools=[TOOL])
    (call,) = [item for item in first.output if isinstance(item, ResponseFunctionToolCall)]
    assert (call.name, call.arguments) == ("get_weather", '{"city":"Weather in Paris?"}')
    second = client.responses.create(
        model=MODEL,
        tools=[TOOL],
        input=[
            {"role": "user", "content": QUESTION},
            {
                "type": "function_call",
                "call_id": call.call_id,
                "name": call.name,
                "arguments": call.arguments,
            },
            {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"},
        ],
    )
    assert second.output_text.startswith("The sandbox read “18 degrees”.")
    assert second.usage is not None
    record = account.settled_record(2)
    assert_booked(record, prompt=second.usage.input_tokens, completion=second.usage.output_tokens)


@responses
def test_a_response_is_parsed_into_a_model(account: Account) -> None:
    answer = sdk(account.key).responses.parse(model=MODEL, input=QUESTION, text_format=Forecast)
    assert answer.output_parsed == Forecast(city=QUESTION, degrees=1)
    assert account.settled_record()["status"] == "completed"


@responses
def test_a_response_reads_an_image(account: Account) -> None:
    answer = sdk(account.key).responses.create(
        model=MODEL,
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "What is this?"},
                    {"type": "input_image", "image_url": IMAGE, "detail": "auto"},
                ],
            }
        ],
    )
    assert answer.output_text.startswith("The sandbox read “What is this?")
    assert answer.usage is not None
    assert_booked(
        account.settled_record(), prompt=answer.usage.input_tokens, completion=answer.usage.output_tokens
    )


@responses
@pytest.mark.parametrize("streamed", [False, True])
def test_a_response_is_refused_with_the_same_classes_of_error(account: Account, streamed: bool) -> None:
    def ask(key: str, model: str = MODEL) -> Any:
        return sdk(key).responses.create(model=model, input=PROMPT, stream=streamed)

    with pytest.raises(openai.AuthenticationError):
        ask(WRONG_KEY)
    with pytest.raises(openai.NotFoundError):
        ask(account.key, UNKNOWN_MODEL)
    with pytest.raises(openai.APIStatusError) as refusal:
        ask(new_account(credits=0).key)
    assert refusal.value.status_code == 402
    account.limit(burst=0)
    with pytest.raises(openai.RateLimitError):
        ask(account.key)
    assert account.records() == []


@responses
def test_a_client_that_leaves_a_streamed_response_has_one_settled_record(account: Account) -> None:
    stream = sdk(account.key).responses.create(
        model=f"{MODEL}:slow;ms=5;tokens={LONG}", input=PROMPT, stream=True
    )
    deltas = (event for event in stream if event.type == "response.output_text.delta")
    assert len([event for event, _ in zip(deltas, range(3), strict=False)]) == 3
    stream.close()
    assert_left(account.settled_record())


@embeddings
@pytest.mark.parametrize("form", ["float", "base64"])
def test_texts_become_vectors(account: Account, form: Any) -> None:
    answer = sdk(account.key).embeddings.create(
        model=EMBEDDER, input=["one", "two"], dimensions=8, encoding_format=form
    )
    assert [entry.index for entry in answer.data] == [0, 1]
    record = account.settled_record()
    told: Any = answer.usage
    assert (record["endpoint"], record["prompt_tokens"], record["cost"]) == (
        "embeddings",
        told.prompt_tokens,
        told.cost,
    )
    assert told.cost > 0
    if form == "float":
        assert [len(entry.embedding) for entry in answer.data] == [8, 8]
        assert sum(value * value for value in answer.data[0].embedding) == pytest.approx(1, abs=1e-3)


@embeddings
def test_the_sdk_asks_for_base64_by_itself_and_decodes_it(account: Account) -> None:
    client = sdk(account.key)
    (by_itself,) = client.embeddings.create(model=EMBEDDER, input="one", dimensions=8).data
    (as_numbers,) = client.embeddings.create(
        model=EMBEDDER, input="one", dimensions=8, encoding_format="float"
    ).data
    assert by_itself.embedding == pytest.approx(as_numbers.embedding, abs=1e-6)
    account.settled_record(2)


@completions
def test_a_text_completion_is_billed_as_told(account: Account) -> None:
    answer = sdk(account.key).completions.create(model=MODEL, prompt=PROMPT, max_tokens=100)
    assert answer.choices[0].text.startswith(READ)
    told: Any = answer.usage
    record = account.settled_record()
    assert_booked(record, prompt=told.prompt_tokens, completion=told.completion_tokens, cost=told.cost)
    assert record["endpoint"] == "completions"


@completions
def test_a_streamed_text_completion_ends_with_its_usage(account: Account) -> None:
    events = list(sdk(account.key).completions.create(model=MODEL, prompt=PROMPT, stream=True))
    assert "".join(event.choices[0].text for event in events if event.choices).startswith(READ)
    told: Any = [event.usage for event in events if event.usage][-1]
    assert_booked(
        account.settled_record(), prompt=told.prompt_tokens, completion=told.completion_tokens, cost=told.cost
    )


@images
def test_an_image_is_made(account: Account) -> None:
    answer = sdk(account.key).images.generate(model=model_that_makes("image"), prompt="A red dot.")
    (made,) = answer.data or []
    assert made.b64_json is not None
    assert base64.b64decode(made.b64_json).startswith((b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF"))
    record = account.settled_record()
    assert (record["status"], record["endpoint"].split("/")[0]) == ("completed", "images")
    assert record["cost"] > 0
    assert account.spent() == record["cost"]


def a_second_of_silence() -> io.BytesIO:
    written = io.BytesIO()
    with wave.open(written, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    written.seek(0)
    written.name = "silence.wav"
    return written


@speech
def test_a_text_is_spoken(account: Account) -> None:
    answer = sdk(account.key).audio.speech.create(
        model=model_that_makes("speech"), voice="alloy", input=PROMPT
    )
    assert len(answer.read()) > 100
    assert answer.response.headers["content-type"].startswith("audio/")
    record = account.settled_record()
    assert (record["status"], record["endpoint"]) == ("completed", "audio/speech")
    assert record["cost"] > 0


@speech
def test_a_spoken_text_is_streamed_to_a_file(account: Account, tmp_path: Any) -> None:
    wanted = sdk(account.key).audio.speech.with_streaming_response
    with wanted.create(model=model_that_makes("speech"), voice="alloy", input=PROMPT) as answer:
        answer.stream_to_file(tmp_path / "speech.mp3")
    assert (tmp_path / "speech.mp3").stat().st_size > 100
    assert account.settled_record()["status"] == "completed"


@transcriptions
def test_a_sound_is_written_down() -> None:
    account = new_account(credits=0.1)  # for a second of sound a fraction of a cent is held
    answer = sdk(account.key).audio.transcriptions.create(
        model=model_that_makes("transcription"), file=a_second_of_silence()
    )
    assert answer.text
    record = account.settled_record()
    assert (record["status"], record["endpoint"]) == ("completed", "audio/transcriptions")
    assert record["cost"] > 0


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(
            lambda client, model: client.embeddings.create(model=model, input="one"),
            marks=embeddings,
            id="embeddings",
        ),
        pytest.param(
            lambda client, model: client.completions.create(model=model, prompt="one"),
            marks=completions,
            id="completions",
        ),
        pytest.param(
            lambda client, model: client.images.generate(model=model, prompt="one"), marks=images, id="images"
        ),
        pytest.param(
            lambda client, model: client.audio.speech.create(model=model, voice="alloy", input="one"),
            marks=speech,
            id="speech",
        ),
        pytest.param(
            lambda client, model: client.audio.transcriptions.create(model=model, file=a_second_of_silence()),
            marks=transcriptions,
            id="transcriptions",
        ),
    ],
)
def test_every_endpoint_refuses_with_the_same_classes_of_error(account: Account, ask: Any) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(sdk(WRONG_KEY), UNKNOWN_MODEL)
    with pytest.raises(openai.NotFoundError):
        ask(sdk(account.key), UNKNOWN_MODEL)
    assert account.records() == []
