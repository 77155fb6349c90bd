"""The daemon over HTTP, to look at only; loaded when --http asks for it."""
