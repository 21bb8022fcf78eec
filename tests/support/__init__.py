"""What tests share: servers, databases, clients and bodies. Nothing in here is a test."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
