"""What runs a trained detector, without torch: sources of pictures, tiles, and what is written of the results."""
