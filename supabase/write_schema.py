"""What does the whole schema look like now? Joins the migrations into schema.sql, each function once and as
it stands: `make schema`.

A test holds the result against what the migrations make, object by object.
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent
HEAD = """-- The whole schema as it stands, for reading: `make schema` joins it out of the migrations, a test compares what the two make.
-- A function that was replaced stands where it first stood, as it was last written.

set check_function_bodies = off; -- it may name what comes after it
"""
RULE = "-- " + "=" * 76
# A function with the comments right above it, up to its last line.
FUNCTION = re.compile(
    r"(?:^-- [^\n]*\n)*^create (?:or replace )?function public\.(\w+)\((.*?)\).*?\$\$.*?\$\$;\n", re.M | re.S
)


def key_of(function: re.Match[str]) -> tuple[str, str]:
    """Its name, and its parameters as far as they tell it from others."""
    return function[1], " ".join(function[2].split())


def whole(migrations: list[Path]) -> str:
    """The schema that these migrations make, in their order."""
    texts = [(path.stem.partition("_")[2], path.read_text()) for path in migrations]
    newest = {key_of(found): found[0] for _, text in texts for found in FUNCTION.finditer(text)}
    written: set[tuple[str, str]] = set()

    def place(found: re.Match[str]) -> str:
        key = key_of(found)
        if key in written:
            return ""
        written.add(key)
        return newest[key].replace("create or replace function", "create function", 1)

    parts = [HEAD]
    for name, text in texts:
        body = re.sub(r"^notify pgrst.*\n", "", FUNCTION.sub(place, text), flags=re.M)
        parts.append(
            "\n".join(("", "", RULE, f"-- {name}", RULE, "", re.sub(r"\n{3,}", "\n\n", body).rstrip() + "\n"))
        )
    return "".join((*parts, "\n\nnotify pgrst, 'reload schema';\n"))


if __name__ == "__main__":
    (FOLDER / "schema.sql").write_text(whole(sorted((FOLDER / "migrations").glob("*.sql"))))
