"""Request and response bodies of the management API, by area."""
