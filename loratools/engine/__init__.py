"""The streaming engine: a plan of a model's tensors is run tile by tile, in constant memory, and can be undone."""
