"""What endpoints share: bodies, errors, pages and exports as HTTP."""
