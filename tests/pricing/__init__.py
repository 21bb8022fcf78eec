"""Tests of `gateway.pricing`: what a request can cost at most."""
