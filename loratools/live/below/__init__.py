"""What lies below a module with adapters: what torch, accelerate and checkpointing do to modules and tensors.

checkpoints   of a training: they hold the base alone, which is said
classes   how a module's class is swapped, and back, between what others put over it
meta      parameters without values: on the meta device, lazy, offloaded
silent    modules whose tensors are in no state dict
stack     who calls
replay    forwards that a backward repeats
"""
