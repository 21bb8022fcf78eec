"""One running instance: parts, start, sweep, stop."""
