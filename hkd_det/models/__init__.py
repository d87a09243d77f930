"""The detector, a file a part. Needs torch."""
