"""Other people's libraries: PaQ for their models."""
