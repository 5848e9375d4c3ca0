"""What an adapter is: modules, the updates that change them, their names, and where they land in a base model.

model       `Adapter`, which every dialect reads into and writes from; `BaseIdentity`, the base that it belongs to
input       one adapter of a call, with its weight, its digest and where it came from
identity    whether two identities are of one base
kinds       one file for each kind of update: its formula
parts       the names that PEFT gives the tensors of a module
shown       what a notebook shows of an adapter
basis       what another basis of a weight does to an update of it
site        where an update lands: a rectangle of a base tensor
factors     factors that are not loaded yet: turned, cut, permuted, padded
low_rank    updates that are products, ΔW = s·left·right: their factors, and updates made of factors
fusing      several modules as one, and one as several: qkv, gate and up
naming      what modules are called, by trainers and by models
converted   updates on tensors that transformers makes of a base's own as it loads them, and the other way round
placement   which tensors of a base an adapter changes
weights     the weight of an adapter: a number, or one for each module pattern or block
gathered    experts of one adapter, one by one, as the stacks that another has of them
"""
