"""What a student learns from a teacher. Needs torch."""
