"""Plumbing that endpoints share."""
