"""One file a format: where its splits lie, reading them, and for three of them writing them."""
