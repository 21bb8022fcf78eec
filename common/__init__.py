"""What every part may use. Nothing in here imports another part of the project."""
