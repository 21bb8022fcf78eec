"""Tests of the SQL functions, with the rights that the gateway has."""
