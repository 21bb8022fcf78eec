"""The models that are simulated, and their prices."""
