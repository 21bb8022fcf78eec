"""Tests of `gateway.webhooks`: signed deliveries to public addresses."""
