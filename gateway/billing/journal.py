"""Settlements on disk until the database has them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import orjson
import structlog

log = structlog.get_logger("settlements")
Item = dict[str, Any]


class Journal:
    """Settlements on disk, a file each, until the database has them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, item: Item) -> None:
        """Writes an item so that it survives this process. Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(item)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            file.write(orjson.dumps(item))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)

    def drop(self, item: Item) -> None:
        self._path(item).unlink(missing_ok=True)

    def read(self) -> list[Item]:
        """What earlier processes left behind; a file that is no settlement is left where it is, and named in
        the log.
        """
        found = []
        for path in sorted(self._folder.glob("*.json")) if self._folder.is_dir() else ():
            try:
                found.append(_read_item(path.read_bytes()))
            except (ValueError, OSError) as error:
                log.error("settlement_journal_unreadable", file=path.name, reason=str(error))
        return found

    def _path(self, item: Item) -> Path:
        return self._folder / f"{item['request_id']}.json"


def _read_item(raw: bytes) -> Item:
    item = orjson.loads(raw)
    if not isinstance(item, dict) or not isinstance(item.get("request_id"), str):
        raise ValueError("not a settlement")
    return item
