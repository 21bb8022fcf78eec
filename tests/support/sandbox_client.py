"""A client of the simulator, with short ways to ask it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx2

from sandbox import Sandbox

BASE_URL = "https://openrouter.ai/api/v1"
KEY = {"Authorization": "Bearer sk-or-v1-test"}
HI = [{"role": "user", "content": "Say hi"}]


@dataclass
class Client:
    """Short ways to ask the simulator."""

    app: Sandbox
    http: httpx2.AsyncClient

    def request(
        self, scenario: str = "ordinary", path: str = "/chat/completions", **body: Any
    ) -> httpx2.Request:
        body = {"model": "openai/gpt-4o-mini", "messages": HI, **body}
        headers = {**KEY, "x-sandbox-scenario": scenario}
        return self.http.build_request("POST", path, headers=headers, json=body)

    async def ask(self, scenario: str = "ordinary", **body: Any) -> httpx2.Response:
        return await self.http.send(self.request(scenario, **body))

    async def open_stream(self, scenario: str = "ordinary", **body: Any) -> httpx2.Response:
        return await self.http.send(self.request(scenario, stream=True, **body), stream=True)

    async def look_up(self, generation_id: str) -> httpx2.Response:
        return await self.http.get("/generation", params={"id": generation_id}, headers=KEY)
