"""The endpoints that generate: how each reads its request and renders its response."""
