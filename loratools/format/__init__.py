"""The loratools format, the twin of `spec/v1`.

manifest      the JSON in a safetensors header that says what the tensors mean
registry      the kinds of update: their tensors, and the shapes these have
keys          the names of tensors, which are PEFT's
peft_config   the `adapter_config.json` with which PEFT applies the same numbers
digest        the digest of an adapter: one name for what it holds
clauses       the clauses of the specification, one function each
validate      all clauses at once
reader        a file or folder -> `Adapter`
writer        `Adapter` -> a file or folder, the same bytes every time
record        what a merged model says of its merge, in `loratools.json`
"""
