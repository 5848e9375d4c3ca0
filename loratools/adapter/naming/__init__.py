"""Names of modules.

wrappers    what trainers put before a name, and the projections that some models store fused
compact     many names in few lines: `model.layers.[0-29].self_attn.{q,v}_proj`
conversions what transformers 5 renames, fuses, splits, stacks and permutes as it loads, by a table of its own rules
loaded      the names of a base's tensors as transformers loads them
stacked     how the classes of transformers stack experts: the order of parameters, and how weights lie
selection   which modules a command works on: names, globs, regular expressions
llama_cpp   llama.cpp's names of modules, and the rows that its converter permutes
llama_cpp_table  what is known of each of llama.cpp's architectures, as data
image       the modules of image models, in every spelling in use
"""
