"""Models for embeddings, rankings, images, speech and transcripts. Prices are written as in `text_models`.

Ids, units and prices follow OpenRouter's catalog of 2026 where it is known. The context lengths of audio
models are chosen so that they limit the length of a recording.
"""

from __future__ import annotations

from .entry import SAMPLING, Model, at

VOICES = ("alloy", "ash", "ballad", "coral", "echo", "fable", "onyx", "nova", "sage", "shimmer", "verse")
_DRAWING = ("seed", "n", "quality", "size")

MEDIA: tuple[Model, ...] = (
    Model(
        "openai/text-embedding-3-small",
        "OpenAI: Text Embedding 3 Small",
        8_192,
        None,
        at(("OpenAI", {"prompt": "0.00000002", "completion": "0"})),
        parameters=("dimensions", "encoding_format"),
        outputs=("embeddings",),
    ),
    Model(
        "cohere/rerank-v3.5",
        "Cohere: Rerank v3.5",
        4_096,
        None,
        at(("Cohere", {"prompt": "0", "completion": "0", "request": "0.002"})),
        parameters=("top_n",),
        outputs=("rerank",),
    ),
    Model(
        "qwen/qwen3-reranker-8b",
        "Qwen: Qwen3 Reranker 8B",
        32_768,
        None,
        at(("DeepInfra", {"prompt": "0.00000005", "completion": "0"})),
        parameters=("top_n",),
        outputs=("rerank",),
    ),
    Model(
        "google/gemini-2.5-flash-image",
        "Google: Gemini 2.5 Flash Image (Nano Banana)",
        32_768,
        32_768,
        at(
            (
                "Google AI Studio",
                {
                    "prompt": "0.0000003",
                    "completion": "0.0000025",
                    "image": "0.001238",
                    "image_output": "0.00003",
                },
            )
        ),
        parameters=("max_tokens", "response_format", *SAMPLING),
        inputs=("text", "image"),
        outputs=("image", "text"),
        style="google",
    ),
    Model(
        "openai/gpt-5-image-mini",
        "OpenAI: GPT-5 Image Mini",
        400_000,
        128_000,
        at(
            (
                "OpenAI",
                {
                    "prompt": "0.0000025",
                    "completion": "0.000002",
                    "request": "0",
                    "image": "0",
                    "image_output": "0.000008",
                },
            )
        ),
        parameters=_DRAWING,
        inputs=("text", "image"),
        outputs=("image",),
    ),
    Model(
        "openai/gpt-4o-mini-tts",
        "OpenAI: GPT-4o Mini TTS",
        4_096,
        None,
        at(("OpenAI", {"prompt": "0.0000006", "completion": "0"})),
        parameters=("voice", "speed"),
        outputs=("speech",),
        slug="openai/gpt-4o-mini-tts-2025-12-15",
        unit="character",
        voices=VOICES,
    ),
    Model(
        "google/gemini-2.5-flash-preview-tts",
        "Google: Gemini 2.5 Flash Preview TTS",
        32_768,
        16_384,
        at(("Google AI Studio", {"prompt": "0.0000005", "completion": "0.00001", "audio_output": "0.00001"})),
        parameters=("voice",),
        outputs=("speech",),
        style="google",
        voices=("Kore", "Puck", "Zephyr"),
    ),
    Model(
        "openai/whisper-1",
        "OpenAI: Whisper 1",
        7_200,
        None,
        at(("OpenAI", {"prompt": "0", "completion": "0", "audio": "0.0001"})),
        parameters=("language", "temperature"),
        inputs=("audio",),
        outputs=("transcription",),
        unit="second",
    ),
    Model(
        "openai/gpt-4o-transcribe",
        "OpenAI: GPT-4o Transcribe",
        128_000,
        2_000,
        at(("OpenAI", {"prompt": "0.0000025", "completion": "0.00001", "audio": "0.000006"})),
        parameters=("language", "temperature"),
        inputs=("audio",),
        outputs=("transcription",),
    ),
)
