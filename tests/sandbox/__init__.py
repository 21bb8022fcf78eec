"""Tests of `sandbox`: the OpenRouter simulator."""
