"""The checks of the house that `make check` runs, and the tests that these checks find what they look for."""
