"""A request to the upstream is the one that the OpenAI SDK would send."""

from __future__ import annotations

from openai._models import FinalRequestOptions

from config import Settings
from gateway.upstream.client import open_live
from tests.support.upstream import Upstream

HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


async def test_a_copied_request_is_what_the_sdk_builds(upstream: Upstream) -> None:
    fields = {
        "openrouter_api_key": "sk-or-v1-x",
        "openrouter_base_url": upstream.url,
        "openrouter_site_name": "Test",
    }
    settings = Settings.model_validate(fields)
    live = open_live(settings)
    try:
        for body in (b'{"model": "openai/gpt-4o-mini"}', b'{"model": "a longer body than the first one"}'):
            answer = await live._client.transmit("/chat/completions", body, HEADERS)
            await answer.aclose()
            options = FinalRequestOptions.construct(
                method="post", url="/chat/completions", content=body, headers=HEADERS
            )
            built = live._client._build_request(options)
            sent = answer.request
            assert built.headers.pop("content-length") == str(
                len(body)
            )  # which the transport sends by itself
            assert (sent.method, sent.url, sent.headers, sent.extensions["timeout"]) == (
                built.method,
                built.url,
                built.headers,
                built.extensions["timeout"],
            )
    finally:
        await live.aclose()
