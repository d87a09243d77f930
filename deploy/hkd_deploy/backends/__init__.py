"""One runtime a file; `opening` chooses, `backend` says what they have in common."""
