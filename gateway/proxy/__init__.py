"""The life of one proxied request."""
