"""What does the deployed tree do when it is imported? Run by `benchmarks.bundle` with the bundle's own
Python, in the bundle's folder.

`probe.py time` prints how long the import of the app took, in seconds; `probe.py health` what GET /health
answers, as JSON.
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
        answer = client.get("/health")
    return {"status": answer.status_code, "problem": answer.json()["problem"]}


if __name__ == "__main__":
    sys.path.insert(0, ".")
    print(import_seconds() if sys.argv[1] == "time" else json.dumps(health()))
