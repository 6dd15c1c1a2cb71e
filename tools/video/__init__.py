"""TSM, a classifier of clips, and its data."""
