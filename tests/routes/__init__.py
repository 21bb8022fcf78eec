"""Tests of `routes`: the management endpoints over HTTP."""
