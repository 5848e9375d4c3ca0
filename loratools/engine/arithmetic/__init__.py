"""What is computed on a tile, one file for each way of computing it."""
