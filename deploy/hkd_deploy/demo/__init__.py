"""The demo: a stream, a detector, and what it sees in a window or a film."""
