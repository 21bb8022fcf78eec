"""The types of parsed JSON, for code that reads bodies and answers that others wrote. They promise nothing of
a value: every reader checks its type first.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import TypeAlias

# Lists and dictionaries, and not Sequence and Mapping: a `str` is a Sequence, too, and an `isinstance` check
# for `list` or `dict` then tells mypy all that there is to know. Decimals come from parsers with exact
# numbers.
Json: TypeAlias = "bool | int | float | str | Decimal | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = Mapping[str, Json]  # to read from; `dict[str, Json]` is one that may be written to
