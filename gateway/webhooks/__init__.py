"""Signed deliveries to users' URLs."""
