"""How a detector learns. Needs torch."""
