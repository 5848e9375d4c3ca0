"""Where an adapter's updates land in a base model. Pure: names and shapes, until `settle` reads tensors.

codes     modules that the base stores as codes: refused by the name of the quantization
resolve   from modules to the tensors of a base, and the rectangles of them
slices    projections that a model has only as slices of a fused weight
conv1d    whether a linear layer's weight is stored [in, out]
experts   experts of a mixture, stacked in one tensor or each in tensors of its own
stacks    which parameter a stack of experts is for, and how it lies, where the adapter's file leaves it open
classes   what transformers' classes tie, by a table
shared    which names of a base model are one weight
tied      what becomes of a change of one of them, by policy
spread    changes of one name that come onto others
apart     a weight of several names taken apart
layers    a base with its layers repeated, as `layer_replication` has it
image     an adapter of an image model under the names of a base
gguf      adapters on a GGUF base: names, experts of a stack, rows of q and k
whole     tensors that were trained whole: where they go, and what config.json has to say of it
settle    what in an adapter is a copy of the base's own tensors, and what replaces them
weight    the base's weight under an update
owners    what parameters belong to: linear layers, convolutions, embeddings, experts, heads
"""
