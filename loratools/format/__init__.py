"""The loratools format, the twin of `spec/v1`.

manifest      the JSON in a safetensors header that says what the tensors mean
registry      the kinds of update and their tensors
shapes        the shapes that the tensors of each kind have
canonical     canonical JSON: one text for one value
meaning       the digest of what the tensors mean: an edited scaling shows
keys          the names of tensors, which are PEFT's
peft_config   the `adapter_config.json` with which PEFT applies the same numbers
digest        the digest of an adapter: one name for what it holds
clauses       the clauses of the specification, one function each
validate      all clauses at once
reader        a file or folder -> `Adapter`
writer        `Adapter` -> a file or folder, the same bytes every time
record        what a merged model says of its merge, in `loratools.json`
"""
