"""Tests of `embedded`: the PostgreSQL of the wheel, its migrations and the in-process transport."""
