"""Measures how fast the gateway is, with authentication, holds and durable ledger writes on.

`docs/benchmarks.md` says what the figures mean. The service never imports anything from here.
"""
