"""The streaming engine: a plan of a model's tensors is run tile by tile, in constant memory, and can be undone.

How a merge goes through it:

    plan         what becomes of each tensor: a value, made from headers
    run          runs a plan: copies beside arithmetic, which is chosen for each tensor
    copies       what comes to the output as it is
    turns        shares the work out, so that two threads seldom write to one file
    load         from placements to loaded factors
    task         one output tensor, what is measured on it, and what an arithmetic offers
    tensor       the tile loop: read, hash, change, write
    arithmetic   what is computed on a tile: in C, or in torch
    coded        the tile loop of a weight that becomes codes again
    sealed       whether the base is the one that adapters were sealed with
    stochastic   rounding at random
    device       the processor or a CUDA device
    lane         the way of a thread to a device: its stream, and page-locked memory

`residual` keeps what rounding destroyed, to undo a merge.
"""
