"""The models that are simulated."""
