"""Imports the deployed tree and reports; `benchmarks.bundle` runs it in the bundle, with its Python.

`probe.py time` prints how long the import of the app took, in seconds. `probe.py health` prints what GET
/health answers, as JSON.
"""

from __future__ import annotations

import json
import sys
import time


def import_seconds() -> float:
    """How long `import app` takes in a fresh process."""
    began = time.perf_counter()
    import app  # noqa: F401

    return time.perf_counter() - began


def health() -> dict[str, object]:
    """Status and problem of GET /health, after the lifespan has run as it does on the platform."""
    from starlette.testclient import TestClient

    import app

    with TestClient(app.app) as client:
        response = client.get("/health")
    return {"status": response.status_code, "problem": response.json()["problem"]}


if __name__ == "__main__":
    sys.path.insert(0, ".")
    print(import_seconds() if sys.argv[1] == "time" else json.dumps(health()))
