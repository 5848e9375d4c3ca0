"""Where an adapter's updates land in a base model: modules to tensors, slices, experts, ties and layers."""
