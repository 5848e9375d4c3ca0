"""How numbers are stored: one file for each family of encodings."""
