"""The ground: what every part may use; imports nothing of ours."""
