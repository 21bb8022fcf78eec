"""Pure: which models there are, what they cost, what a request can cost at most."""
