"""Models that write text, and the list of all models. Facts about models are here and in `media_models` only.

Prices are US dollars per unit as decimal strings, as OpenRouter's `/models` writes them; `discount` is a
number. The entries resemble real ones, and have every form of price that OpenRouter uses.
"""

from __future__ import annotations

from collections.abc import Mapping

from .entry import SAMPLING, THINKING, VISION, Model, at
from .media_models import MEDIA

_GPT_4O_MINI = {
    "prompt": "0.00000015",
    "completion": "0.0000006",
    "request": "0",
    "image": "0",
    "web_search": "0.01",
    "input_cache_read": "0.000000075",
    "discount": 0,
}
_GPT_4O = {
    "prompt": "0.0000025",
    "completion": "0.00001",
    "request": "0",
    "image": "0.003613",
    "web_search": "0.01",
    "input_cache_read": "0.00000125",
    "discount": 0,
}
_O4_MINI = {
    "prompt": "0.0000011",
    "completion": "0.0000044",
    "request": "0",
    "image": "0.0008415",
    "web_search": "0.01",
    "input_cache_read": "0.000000275",
}
_SONNET = {
    "prompt": "0.000003",
    "completion": "0.000015",
    "image": "0",
    "web_search": "0.01",
    "input_cache_read": "0.0000003",
    "input_cache_write": "0.00000375",
    "input_cache_write_1h": "0.000006",
    "overrides": [
        {
            "min_prompt_tokens": 200_000,
            "prompt": "0.000006",
            "completion": "0.0000225",
            "input_cache_read": "0.0000006",
            "input_cache_write": "0.0000075",
            "input_cache_write_1h": "0.000012",
        }
    ],
}
_HAIKU = {
    "prompt": "0.000001",
    "completion": "0.000005",
    "image": "0",
    "web_search": "0.01",
    "input_cache_read": "0.0000001",
    "input_cache_write": "0.00000125",
    "input_cache_write_1h": "0.000002",
}
_GEMINI_PRO = {
    "prompt": "0.00000125",
    "completion": "0.00001",
    "image": "0.00516",
    "audio": "0.00000125",
    "input_cache_read": "0.000000125",
    "input_cache_write": "0.000000375",
    "overrides": [
        {
            "min_prompt_tokens": 200_000,
            "prompt": "0.0000025",
            "completion": "0.000015",
            "input_cache_read": "0.00000025",
            "input_cache_write": "0.000000375",
        }
    ],
}
_GEMINI_FLASH = {
    "prompt": "0.0000003",
    "completion": "0.0000025",
    "request": "0",
    "image": "0.001238",
    "audio": "0.000001",
    "internal_reasoning": "0.0000025",
    "input_cache_read": "0.00000003",
}
_FREE = {
    "prompt": "0",
    "completion": "0",
    "request": "0",
    "image": "0",
    "web_search": "0",
    "internal_reasoning": "0",
}

MODELS: tuple[Model, ...] = (
    Model(
        "openai/gpt-4o-mini",
        "OpenAI: GPT-4o-mini",
        128_000,
        16_384,
        at(("OpenAI", _GPT_4O_MINI), ("Azure", _GPT_4O_MINI)),
        inputs=VISION,
    ),
    Model(
        "openai/gpt-4o",
        "OpenAI: GPT-4o",
        128_000,
        16_384,
        at(("OpenAI", _GPT_4O), ("Azure", _GPT_4O)),
        inputs=VISION,
    ),
    Model(
        "openai/o4-mini",
        "OpenAI: o4 Mini",
        200_000,
        100_000,
        at(("OpenAI", _O4_MINI)),
        parameters=THINKING,
        inputs=VISION,
        reasoning="mandatory",
    ),
    Model(
        "anthropic/claude-sonnet-4.5",
        "Anthropic: Claude Sonnet 4.5",
        1_000_000,
        64_000,
        at(("Anthropic", _SONNET), ("Amazon Bedrock", _SONNET)),
        parameters=THINKING,
        inputs=VISION,
        reasoning="optional",
        style="anthropic",
    ),
    Model(
        "anthropic/claude-haiku-4.5",
        "Anthropic: Claude Haiku 4.5",
        200_000,
        64_000,
        at(("Anthropic", _HAIKU), ("Amazon Bedrock", _HAIKU)),
        parameters=THINKING,
        inputs=VISION,
        reasoning="optional",
        style="anthropic",
    ),
    Model(
        "google/gemini-2.5-pro",
        "Google: Gemini 2.5 Pro",
        1_048_576,
        65_536,
        at(("Google", _GEMINI_PRO), ("Google AI Studio", _GEMINI_PRO)),
        parameters=THINKING,
        inputs=("text", "image", "file", "audio"),
        reasoning="mandatory",
        style="google",
    ),
    Model(
        "google/gemini-2.5-flash",
        "Google: Gemini 2.5 Flash",
        1_048_576,
        65_535,
        at(("Google AI Studio", _GEMINI_FLASH), ("Google", _GEMINI_FLASH)),
        parameters=THINKING,
        inputs=("text", "image", "file", "audio"),
        reasoning="optional",
        style="google",
    ),
    Model(
        "deepseek/deepseek-chat-v3.1",
        "DeepSeek: DeepSeek V3.1",
        163_840,
        32_768,
        at(
            (
                "DeepSeek",
                {"prompt": "0.0000002", "completion": "0.0000008", "input_cache_read": "0.00000002"},
            ),
            ("Novita", {"prompt": "0.00000027", "completion": "0.000001"}),
        ),
        parameters=THINKING,
        reasoning="optional",
    ),
    Model(
        "deepseek/deepseek-r1",
        "DeepSeek: R1",
        163_840,
        32_768,
        at(
            ("DeepSeek", {"prompt": "0.0000007", "completion": "0.0000025", "input_cache_read": "0.00000014"})
        ),
        parameters=THINKING,
        reasoning="mandatory",
    ),
    Model(
        "meta-llama/llama-3.3-70b-instruct",
        "Meta: Llama 3.3 70B Instruct",
        131_072,
        16_384,
        at(
            ("DeepInfra", {"prompt": "0.00000013", "completion": "0.00000039", "request": "0", "image": "0"}),
            ("Groq", {"prompt": "0.00000059", "completion": "0.00000079", "request": "0", "image": "0"}),
        ),
    ),
    Model(
        "meta-llama/llama-3.3-70b-instruct:free",
        "Meta: Llama 3.3 70B Instruct (free)",
        65_536,
        None,
        at(("Chutes", _FREE)),
    ),
    Model(
        "mistralai/mistral-nemo",
        "Mistral: Mistral Nemo",
        131_072,
        16_384,
        at(
            ("DeepInfra", {"prompt": "0.00000002", "completion": "0.00000004"}),
        ),
    ),
    Model(
        "qwen/qwen3-coder-next",
        "Qwen: Qwen3 Coder Next",
        262_144,
        65_536,
        at(("Parasail", {"prompt": "0.00000012", "completion": "0.00000075", "discount": 0.25})),
    ),
    Model(
        "perplexity/sonar",
        "Perplexity: Sonar",
        127_072,
        8_192,
        at(
            (
                "Perplexity",
                {"prompt": "0.000001", "completion": "0.000001", "request": "0.005", "web_search": "0.005"},
            )
        ),
        parameters=("max_tokens", "web_search_options", *SAMPLING),
    ),
    Model(
        "morph/morph-v3-fast",
        "Morph: Morph V3 Fast",
        81_920,
        4_096,
        at(("Morph", {"prompt": "0.0000008", "completion": "0.0000012"})),
        parameters=("stop", "temperature"),
    ),
    Model(
        "openrouter/auto",
        "Auto Router",
        2_000_000,
        None,
        at(("OpenRouter", {"prompt": "-1", "completion": "-1", "discount": 0})),
        parameters=THINKING,
        inputs=VISION,
        stands_for="openai/gpt-4o-mini",
    ),
    *MEDIA,
    Model(
        "sandbox/fixed-price",
        "Sandbox: a fixed price per request",
        8_192,
        4_096,
        at(("Sandbox", {"prompt": "0", "completion": "0", "request": "0.5"})),
    ),
)

BY_ID: Mapping[str, Model] = {model.id: model for model in MODELS}
CHEAPEST = BY_ID["mistralai/mistral-nemo"]

# The providers at which an abort stops generation and billing:
# https://openrouter.ai/docs/api-reference/streaming#stream-cancellation
# fmt: off
STOPS_BILLING_ON_ABORT = frozenset({
    "OpenAI", "Azure", "Anthropic", "Fireworks", "Mancer", "Recursal", "AnyScale", "Lepton",
    "OctoAI", "Novita", "DeepInfra", "Together", "Cohere", "Hyperbolic", "Infermatic", "Avian",
    "XAI", "Cloudflare", "SFCompute", "Nineteen", "Liquid", "Friendli", "Chutes", "DeepSeek",
})
# fmt: on
