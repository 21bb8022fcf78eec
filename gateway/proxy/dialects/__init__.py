"""How each API says usage, errors and its end."""
