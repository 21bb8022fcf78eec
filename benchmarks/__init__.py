"""How fast is the gateway, with authentication, holds and durable ledger writes on? `python -m benchmarks`
measures it.

`docs/benchmarks.md` says what the figures mean. Nothing here is imported by the service.
"""
