"""The types of parsed JSON, for code that reads bodies and responses of others.

They promise nothing about a value: every reader must check its type first.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import TypeAlias

# `list` and `dict`, not Sequence and Mapping: a `str` is a Sequence, too, and after an `isinstance` check for
# `list` or `dict` mypy knows the exact type. Decimals come from parsers that keep numbers exact.
Json: TypeAlias = "bool | int | float | str | Decimal | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = Mapping[str, Json]  # read-only; a `dict[str, Json]` may be written to
