"""Tests of the arithmetic of `benchmarks`; nothing is measured here."""
