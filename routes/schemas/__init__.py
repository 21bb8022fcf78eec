"""Request and response bodies, by area."""
