"""Tests of `gateway.upstream`: what is sent to OpenRouter, and what is made of its answers and failures."""
