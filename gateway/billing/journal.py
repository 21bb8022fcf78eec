"""Settlements on disk, where there is one, until the database has them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import orjson
import structlog

from db_rows.requests import SettlementItem

log = structlog.get_logger("settlements")


class Journal:
    """A folder with one file for each settlement that the database has not taken yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, item: SettlementItem) -> None:
        """Writes an item so that it survives this process. Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(item)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            file.write(orjson.dumps(item))
            file.flush()
            os.fsync(file.fileno())
        # Renamed only when it is whole: a reader never sees half a settlement.
        temporary.rename(path)

    def drop(self, item: SettlementItem) -> None:
        """Removes an item that the database has."""
        self._path(item).unlink(missing_ok=True)

    def read(self) -> list[SettlementItem]:
        """The items that earlier processes left behind. A file that is no settlement stays where it is, and
        is named in the log.
        """
        items = []
        for path in sorted(self._folder.glob("*.json")) if self._folder.is_dir() else ():
            try:
                items.append(_read_item(path.read_bytes()))
            except (ValueError, OSError) as error:
                log.error("settlement_journal_unreadable", file=path.name, reason=str(error))
        return items

    def _path(self, item: SettlementItem) -> Path:
        return self._folder / f"{item['request_id']}.json"


def _read_item(raw: bytes) -> SettlementItem:
    # Only the id is checked: the database checks each field of what this process or an earlier version wrote.
    item = orjson.loads(raw)
    if not isinstance(item, dict) or not isinstance(item.get("request_id"), str):
        raise ValueError("not a settlement")
    return cast(SettlementItem, item)
