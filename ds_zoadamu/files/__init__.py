"""Files: whole or not at all, locked, read within bounds, and the formats they have."""
