"""How images are named: given, recorded, read, and found again."""
