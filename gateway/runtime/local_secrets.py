"""The secrets of a bare machine: made on the first start and kept in the data folder, readable by its owner
only.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

FILE = "secrets.json"


@dataclass(frozen=True, slots=True)
class Secrets:
    """What the data folder holds; `is_new` for the one process that made it."""

    key_hash_secret: str
    encryption_key: str
    admin_api_key: str
    is_new: bool


def keep_secrets(data_dir: Path) -> Secrets:
    """The secrets of this data folder. Of several processes that start at once, one makes them.

    Raises OSError, and ValueError or KeyError for a damaged file.
    """
    path = data_dir / FILE
    is_new = not path.exists() and _create(path)
    texts = json.loads(path.read_text())
    return Secrets(texts["key_hash_secret"], texts["encryption_key"], texts["admin_api_key"], is_new)


def _create(path: Path) -> bool:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(_new_texts(), file)
        file.flush()
        os.fsync(file.fileno())
    try:
        # A link fails where another process was first; a rename would replace the secrets that it already
        # uses.
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _new_texts() -> dict[str, str]:
    return {
        "key_hash_secret": _secret(),
        "encryption_key": _secret(),
        "admin_api_key": "gw_admin_" + secrets.token_urlsafe(32),
    }


def _secret() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
