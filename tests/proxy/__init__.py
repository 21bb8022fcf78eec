"""Tests of `gateway.proxy`: the life of a proxied request, end to end and piece by piece."""
