"""What is computed on a tile, one file for each way of computing it; `engine/task.py` has what each must offer.

`native` has products on rows of BF16, F16 and F32, as LoRA and DoRA are, in C, and `passed` the same from file to file;
`torch` has any kind on any dtype, on the processor or a CUDA device.
"""
