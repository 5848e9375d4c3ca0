"""What an adapter is: modules, the updates that change them, their names, and where they land in a base model."""
