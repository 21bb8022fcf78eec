"""Tests of `gateway.billing`: holds, charges, stored answers and the books."""
