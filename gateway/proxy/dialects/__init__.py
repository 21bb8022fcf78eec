"""How each API reports usage, errors and the end of an answer. Nothing here knows accounts or databases."""
