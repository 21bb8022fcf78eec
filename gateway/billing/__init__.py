"""Holds and charges: every request admitted once, settled once."""
