"""The detector: what it is, how it learns, how it is judged."""
