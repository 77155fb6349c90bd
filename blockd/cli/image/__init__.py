"""`blockctl image …`: work on image files that no daemon has open."""
