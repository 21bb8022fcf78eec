"""The version that `/`, `/health` and the OpenAPI document show. CHANGELOG.md has an entry for it."""

VERSION = "0.2.0"
