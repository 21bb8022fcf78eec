"""Tests of `gateway.runtime`: instances that start, share a database, lose it, and stop."""
