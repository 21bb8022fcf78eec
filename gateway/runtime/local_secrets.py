"""Secrets of a bare machine, made once. Secrets and an admin key, made once and kept in the data folder."""

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
    """The secrets of this data folder; of several processes that start at once, one makes them. Raises
    OSError.
    """
    path = data_dir / FILE
    is_new = not path.exists() and _create(path)
    found = json.loads(path.read_text())
    return Secrets(found["key_hash_secret"], found["encryption_key"], found["admin_api_key"], is_new)


def _create(path: Path) -> bool:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(
            {
                "key_hash_secret": _secret(),
                "encryption_key": _secret(),
                "admin_api_key": "gw_admin_" + secrets.token_urlsafe(32),
            },
            file,
        )
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)  # fails where another process was first, as a rename would not
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _secret() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
