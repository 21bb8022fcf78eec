"""What tests share: servers, databases, clients and bodies. Nothing in here is a test."""
