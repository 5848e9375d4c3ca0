"""What an adapter is: its updates, the names of their targets, and where they land in a base model. No files."""
