"""The ways in which adapters act on a running model. Each has `forward(site, …)`, which computes one module.

named     by name, each with a weight
rows      another adapter for each row of the batch
batch     what shows the rows: a model's own inputs, and those of its modules
stacks    all in one stack a module, chosen by an index tensor, for torch.compile
merged    in the weights themselves, until they get their bits back
"""
