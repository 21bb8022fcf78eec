"""What a request body asks for that costs money, by endpoint."""
