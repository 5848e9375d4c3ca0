"""Bytes and files; nothing here knows of adapters.

sources       an input: a path, or a reference of which an installed resolver makes a path
resolvers     who makes a path of a reference: filled by `import loratools`, so it imports nothing; files read from afar
stores        object stores and servers of files: read by ranges, written in parts
checkpoint    a model on disk: one file, shards with an index, a folder, a pipeline
header        the safetensors header: read, checked, written canonically
strict_json   JSON files and texts of strangers
dtypes        the dtypes of safetensors: names, bits, torch's twins
codecs        how numbers are stored, one file for each family of encodings
lazy          a tensor that is read when its numbers are asked for
files         positioned reads and writes, copies inside the kernel
digest        digests of tensors and the tiers of a base hash
pickles       tensors in torch's pickled files, without running any code of theirs
gguf          GGUF files: fields and tensors
beside        files beside weights: names, links, chat templates, vocabularies
companions    the files beside a model's weights: which of them come along
layout        where each tensor of an output lies: shards, offsets, the index
save          a safetensors file of lazy tensors; one that tensors are put into as they are made
atomic        an output appears whole, or not at all
rewrite       files changed where they stand, all of them or none
sizes         sizes in bytes, as people write them
"""
