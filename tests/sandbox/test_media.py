"""Clients can read rankings, images, speech and transcripts, which cost what units and prices say and never
more.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from decimal import Decimal
from typing import Any, cast

import httpx2
import openai
import pytest
from openai.types import ImagesResponse

from sandbox import SandboxTransport, create_app
from sandbox.endpoints.speech import hum
from sandbox.models.media_models import MEDIA
from sandbox.models.text_models import BY_ID
from sandbox.multipart import read_form
from tests.support.sandbox_client import Client

KEY = {"Authorization": "Bearer sk-or-v1-test"}
RERANK = {
    "model": "cohere/rerank-v3.5",
    "query": "capital of France",
    "documents": ["Berlin is big.", "Paris is the capital of France."],
}
IMAGE = {"model": "google/gemini-2.5-flash-image", "prompt": "a red panda"}
SPEECH = {"model": "openai/gpt-4o-mini-tts", "input": "Hello, this is a test.", "voice": "alloy"}
BODIES: dict[str, dict[str, Any]] = {
    "/rerank": RERANK,
    "/images": IMAGE,
    "/audio/speech": SPEECH,
    "/audio/transcriptions": {
        "model": "openai/whisper-1",
        "input_audio": {"data": "UklGRiQA", "format": "wav"},
    },
    "/embeddings": {"model": "openai/text-embedding-3-small", "input": "x"},
}


def exact(response: httpx2.Response) -> Any:
    return json.loads(response.text, parse_float=Decimal)


def wav(seconds: float) -> bytes:
    size = int(seconds * 16_000)
    return (
        b"RIFF"
        + struct.pack(
            "<I4s4sIHHIIHH4sI", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, 8000, 16_000, 2, 16, b"data", size
        )
        + bytes(size)
    )


async def ask(client: Client, path: str, scenario: str = "ordinary", **body: Any) -> httpx2.Response:
    headers = {**KEY, "x-sandbox-scenario": scenario}
    return await client.http.post(path, json={**BODIES[path], **body}, headers=headers)


async def cost_of(client: Client, response: httpx2.Response) -> Decimal:
    """What `/generation` says it cost."""
    generation = await client.look_up(response.headers["x-generation-id"])
    cost: Decimal = exact(generation)["data"]["total_cost"]
    return Decimal(cost)


# Rankings.


async def test_documents_are_ranked_by_relevance(client: Client) -> None:
    body = (await ask(client, "/rerank", top_n=5)).json()
    assert [result["index"] for result in body["results"]] == [1, 0]
    assert body["results"][0]["document"] == {"text": "Paris is the capital of France."}
    assert 1 >= body["results"][0]["relevance_score"] > body["results"][1]["relevance_score"] >= 0
    assert body["id"].startswith("gen-rerank-") and body["usage"]["search_units"] == 1
    assert len((await ask(client, "/rerank", top_n=1)).json()["results"]) == 1


@pytest.mark.parametrize(
    ("documents", "units"),
    [
        (["x"] * 100, 1),
        (["x"] * 101, 2),
        ([{"text": "word " * 1001}] * 50, 2),
        (["word" + " word" * 499] * 100, 1),
    ],
    ids=["100", "101", "long", "full"],
)
async def test_a_search_unit_is_a_hundred_documents_of_500_tokens(
    client: Client, documents: list[Any], units: int
) -> None:
    response = await ask(client, "/rerank", documents=documents)
    assert exact(response)["usage"]["search_units"] == units
    assert exact(response)["usage"]["cost"] == units * Decimal("0.002") == await cost_of(client, response)


async def test_a_reranker_may_be_billed_by_tokens(client: Client) -> None:
    usage = exact(await ask(client, "/rerank", model="qwen/qwen3-reranker-8b"))["usage"]
    assert usage["cost"] == usage["total_tokens"] * Decimal("0.00000005") > 0
    assert "search_units" not in usage


@pytest.mark.parametrize(
    "body", [{"query": ""}, {"documents": []}, {"documents": [1]}, {"documents": "x"}, {"top_n": 0}]
)
async def test_a_wrong_ranking_is_a_400(client: Client, body: dict[str, Any]) -> None:
    assert (await ask(client, "/rerank", **body)).status_code == 400


# Images.


def read_png(data: bytes) -> tuple[int, int, bytes]:
    """Width, height and pixels of a PNG whose checksums are right."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, position = {}, 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, content = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", data, position + 8 + length)[0] == zlib.crc32(kind + content)
        chunks[kind], position = content, position + 12 + length
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    return width, height, zlib.decompress(chunks[b"IDAT"])


async def test_images_are_valid_and_the_same_for_the_same_prompt(client: Client) -> None:
    first, again = (await ask(client, "/images", n=2)).json(), (await ask(client, "/images", n=2)).json()
    pictures = [base64.b64decode(item["b64_json"]) for item in first["data"]]
    assert all(read_png(picture)[:2] == (16, 16) for picture in pictures)
    assert len({*pictures}) == 2 and first["data"] == again["data"]


async def test_the_openai_sdk_reads_images(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.post("/images", body={**IMAGE, "n": 3}, cast_to=ImagesResponse)
    assert answer.data is not None and len(answer.data) == 3


async def test_each_image_is_billed_in_tokens(client: Client) -> None:
    response = await ask(client, "/images", n=3)
    usage = exact(response)["usage"]
    prices = BY_ID[IMAGE["model"]].endpoints[0].prices
    assert usage["completion_tokens"] == usage["completion_tokens_details"]["image_tokens"] == 3 * 1290
    assert (
        usage["cost"]
        == usage["prompt_tokens"] * prices.prompt + 3 * 1290 * Decimal("0.00003")
        == await cost_of(client, response)
    )


async def test_no_more_than_four_images_are_made(client: Client) -> None:
    assert len((await ask(client, "/images", n=10)).json()["data"]) == 4
    assert (await ask(client, "/images", n=11)).status_code == 400
    assert (await ask(client, "/images", prompt="")).status_code == 400
    assert (await ask(client, "/images", model="openai/gpt-4o-mini")).status_code == 400


async def test_images_are_streamed_as_events(client: Client) -> None:
    response = await ask(client, "/images", model="openai/gpt-5-image-mini", n=2, stream=True, quality="low")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    sent = [json.loads(line, parse_float=Decimal) for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    assert [event["type"].split(".")[1] for event in sent] == ["partial_image", "completed"] * 2
    assert "usage" not in sent[1] and sent[3]["usage"]["cost"] == await cost_of(client, response)


# Speech.


@pytest.mark.parametrize(
    ("form", "start"),
    [("mp3", b"\xff\xf3\x44\xc0"), ("wav", b"RIFF"), ("pcm", hum(zlib.crc32(SPEECH["input"].encode()))[:64])],
)
async def test_the_openai_sdk_reads_speech(sdk: openai.AsyncOpenAI, form: Any, start: bytes) -> None:
    async with sdk.audio.speech.with_streaming_response.create(
        response_format=form, **cast(Any, SPEECH)
    ) as response:
        sound = await response.read()
        media_type = response.headers["content-type"]
    assert (
        media_type
        == {"mp3": "audio/mpeg", "wav": "audio/wav", "pcm": "audio/pcm;rate=24000;channels=1"}[form]
    )
    assert sound.startswith(start) and len(sound) > 1000


async def test_speech_comes_in_pieces_without_usage_and_costs_by_character(client: Client) -> None:
    response = await ask(client, "/audio/speech", input="é" * 1000)
    data = (await client.look_up(response.headers["x-generation-id"])).json()["data"]
    assert data["id"].startswith("gen-tts-") and data["api_type"] == "tts"
    assert await cost_of(client, response) == 1000 * Decimal("0.0000006")
    assert len(response.content) <= 256 * 1024


async def test_speech_by_token_bills_the_sound(client: Client) -> None:
    response = await ask(
        client, "/audio/speech", model="google/gemini-2.5-flash-preview-tts", voice="Kore", input="x" * 30
    )
    data = (await client.look_up(response.headers["x-generation-id"])).json()["data"]
    assert data["tokens_completion"] == 50
    assert await cost_of(client, response) == data["tokens_prompt"] * Decimal("0.0000005") + 50 * Decimal(
        "0.00001"
    )


async def test_a_wav_says_its_size(client: Client) -> None:
    sound = (await ask(client, "/audio/speech", response_format="wav")).content
    assert (
        struct.unpack_from("<I", sound, 4)[0] == len(sound) - 8
        and struct.unpack_from("<I", sound, 40)[0] == len(sound) - 44
    )


@pytest.mark.parametrize(
    "body", [{"input": ""}, {"input": "x" * 4097}, {"response_format": "ogg"}, {"voice": "nobody"}]
)
async def test_wrong_speech_is_a_400_in_json(client: Client, body: dict[str, Any]) -> None:
    response = await ask(client, "/audio/speech", **body)
    assert response.status_code == 400 and response.json()["error"]["code"] == 400


async def test_speech_may_be_slow_cut_or_gzipped(client: Client) -> None:
    assert (await ask(client, "/audio/speech", "slow;ms=1")).content == (
        await ask(client, "/audio/speech", "gzip")
    ).content
    with pytest.raises(httpx2.RemoteProtocolError):
        await ask(client, "/audio/speech", "cut;count=2")
    assert (await ask(client, "/audio/speech", "keepalive, crlf")).content == (
        await ask(client, "/audio/speech")
    ).content


# Transcripts.


async def test_the_openai_sdk_uploads_a_recording(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.audio.transcriptions.create(model="openai/whisper-1", file=("a.wav", wav(9.2)))
    assert answer.text


async def test_an_upload_and_the_json_form_get_the_same(client: Client) -> None:
    sound = wav(9.2)
    uploaded = await client.http.post(
        "/audio/transcriptions",
        headers=KEY,
        files={"file": ("a.wav", sound)},
        data={"model": "openai/gpt-4o-transcribe"},
    )
    audio = {"data": base64.b64encode(sound).decode(), "format": "wav"}
    response = await ask(client, "/audio/transcriptions", model="openai/gpt-4o-transcribe", input_audio=audio)
    assert uploaded.json() == response.json()
    assert uploaded.headers["x-generation-id"].startswith("gen-stt-")


async def test_a_transcript_by_token_costs_what_was_heard_and_written(client: Client) -> None:
    audio = {"data": base64.b64encode(wav(9.2)).decode(), "format": "wav"}
    response = await ask(
        client,
        "/audio/transcriptions",
        model="openai/gpt-4o-transcribe",
        input_audio=audio,
        prompt="about cats",
    )
    usage = exact(response)["usage"]
    assert usage["seconds"] == Decimal("9.2") and usage["input_tokens"] == 92 + 2
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    heard, hint = 92 * Decimal("0.000006"), 2 * Decimal("0.0000025")
    assert (
        usage["cost"]
        == heard + hint + usage["output_tokens"] * Decimal("0.00001")
        == await cost_of(client, response)
    )


async def test_a_transcript_by_duration_says_only_seconds(client: Client) -> None:
    audio = {"data": base64.b64encode(wav(9.2)).decode(), "format": "wav"}
    usage = exact(await ask(client, "/audio/transcriptions", input_audio=audio))["usage"]
    assert usage["seconds"] == Decimal("9.2") and usage["cost"] == 9 * Decimal("0.0001")
    assert "input_tokens" not in usage


async def test_a_transcript_may_be_verbose_or_plain_text(client: Client) -> None:
    verbose = (await ask(client, "/audio/transcriptions", response_format="verbose_json")).json()
    text = await ask(client, "/audio/transcriptions", response_format="text")
    assert verbose["segments"][0]["end"] == verbose["duration"] and verbose["task"] == "transcribe"
    assert text.headers["content-type"].startswith("text/plain") and text.text.strip() == verbose["text"]


@pytest.mark.parametrize(
    "body",
    [
        {"input_audio": None},
        {"input_audio": {"data": "!"}},
        {"response_format": "srt"},
        {
            "model": "openai/gpt-4o-transcribe",
            "input_audio": {"data": base64.b64encode(bytes(16_000 * 1501)).decode()},
        },
        {"model": "openai/gpt-4o-transcribe", "prompt": "a " * 300_000},
    ],
    ids=["nothing", "no base64", "srt", "too long", "long prompt"],
)
async def test_a_wrong_transcription_is_a_400(client: Client, body: dict[str, Any]) -> None:
    assert (await ask(client, "/audio/transcriptions", **body)).status_code == 400


async def test_a_file_above_25_megabytes_is_a_413(client: Client) -> None:
    files = {"file": ("a.mp3", bytes(25 * 1024 * 1024 + 1))}
    refused = await client.http.post(
        "/audio/transcriptions", headers=KEY, files=files, data={"model": "openai/whisper-1"}
    )
    assert refused.status_code == 413


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nno name\r\n--x--"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ncut off',
        ),
    ],
)
async def test_a_broken_form_is_a_400(client: Client, content_type: str, body: bytes) -> None:
    headers = {**KEY, "content-type": content_type}
    assert (await client.http.post("/audio/transcriptions", headers=headers, content=body)).status_code == 400


def test_a_form_keeps_every_byte_of_a_file() -> None:
    content = bytes(range(256)) + b"\r\n--y\r\n"
    form = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n'
        + content
        + b"\r\n--x--\r\n"
    )
    (part,) = read_form('multipart/form-data; boundary="x"', form)
    assert (part.name, part.filename, part.content) == ("file", "a.bin", content)


# All of them.


@pytest.mark.parametrize("path", BODIES)
async def test_the_generation_knows_every_cost(client: Client, path: str) -> None:
    response = await ask(client, path)
    assert await cost_of(client, response) == client.app.state.billed > 0
    if path != "/audio/speech":
        assert exact(response)["usage"]["cost"] == client.app.state.billed


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/audio/speech"])
async def test_costs_may_be_null_missing_zero_or_paid_by_an_own_key(client: Client, path: str) -> None:
    truth = exact(await ask(client, path))["usage"]["cost"]
    usages = {
        name: exact(await ask(client, path, name))["usage"]
        for name in ("cost-null", "cost-missing", "cost-zero", "byok")
    }
    assert usages["cost-null"]["cost"] is None and "cost" not in usages["cost-missing"]
    assert usages["cost-zero"]["cost"] == usages["byok"]["cost"] == 0
    assert usages["byok"]["cost_details"]["upstream_inference_cost"] == truth
    assert "usage" not in exact(await ask(client, path, "usage-missing"))


@pytest.mark.parametrize("path", BODIES)
async def test_failures_and_odd_bodies_reach_every_endpoint(client: Client, path: str) -> None:
    assert (await ask(client, path, "error-503")).headers["retry-after"] == "7"
    assert (await ask(client, path, "error-in-200")).json()["error"]["code"] == 429
    assert (await ask(client, path, "html-body")).text.startswith("<!DOCTYPE")
    assert (await ask(client, path, "redirect")).status_code == 302
    assert client.app.state.billed > 0, "an unreadable answer is billed all the same"
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        (await ask(client, path, "invalid-json")).json()
    ordinary = (await ask(client, path)).content
    for ignored in ("stream-error", "provider-died", "tool-call", "reasoning", "fallback"):
        same = await ask(client, path, ignored)
        assert same.status_code == 200 and len(same.content) == pytest.approx(len(ordinary), abs=20)


@pytest.mark.parametrize("path", BODIES)
async def test_hits_of_the_response_cache_are_free_everywhere(client: Client, path: str) -> None:
    response = await ask(client, path, "cache-hit")
    assert response.headers["x-openrouter-cache-status"] == "HIT"
    assert await cost_of(client, response) == 0


async def test_answers_stay_within_the_byte_limit() -> None:
    transport = SandboxTransport(create_app(max_answer_bytes=2000))
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://sandbox.invalid/v1", headers=KEY
    ) as http:
        speech = await http.post("/audio/speech", json={**SPEECH, "input": "x" * 4000})
        ranking = await http.post("/rerank", json={**RERANK, "documents": ["word " * 100] * 50})
        audio = {"data": base64.b64encode(bytes(16_000 * 600)).decode(), "format": "mp3"}
        words = await http.post(
            "/audio/transcriptions", json={"model": "openai/whisper-1", "input_audio": audio}
        )
        image = await http.post("/images", json={**IMAGE, "n": 4})
    assert len(speech.content) <= 2000
    assert len(ranking.content) < 3000 and ranking.json()["results"]
    assert len(words.json()["text"].encode()) <= 2000
    assert image.status_code == 200 and len(image.content) < 3000


@pytest.mark.parametrize("model", MEDIA, ids=lambda model: model.id)
async def test_every_model_is_listed_under_what_it_puts_out(client: Client, model: Any) -> None:
    listed = (await client.http.get("/models", params={"output_modalities": model.outputs[0]})).json()["data"]
    (entry,) = [item for item in listed if item["id"] == model.id]
    assert entry["architecture"]["output_modalities"] == list(model.outputs) and entry["context_length"]
    endpoints = (await client.http.get(f"/models/{model.id}/endpoints")).json()["data"]["endpoints"]
    assert endpoints[0]["pricing"] == entry["pricing"]
