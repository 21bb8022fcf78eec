"""One module per area; a route translates HTTP to one call."""
