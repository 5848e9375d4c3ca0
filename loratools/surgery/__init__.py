"""What is done with adapters and models: one verb a file, or a folder where a verb needs more."""
