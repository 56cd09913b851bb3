"""Data sets: reading them, checking them, and making the bundled one."""
