"""Tests of `common` and of the modules at the root that need no database."""
