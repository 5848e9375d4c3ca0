"""Recipes: several commands in one file, and how each output was made, so that it can be made again byte for byte.

    catalog    the commands as a recipe sees them: names, keys, and how one is run; `cli/_catalog.py` makes it
    text       YAML of strangers: bounded, without tags, aliases that grow, or a key twice
    value      a recipe: its inputs, and its steps in their order
    read       from YAML to that value, with all problems at once
    identity   what an input or an output is: the digest of its tensors, and of all its files
    account    how an output was made, for its record; and reading that back
    chain      from the account of an output to the recipe that makes it again
    bind       the inputs of a recipe: where the file says, as `--input` says, or by digest in a folder
    made       what is written beside an output: of what and by what it was made, and what it was then
    mergekit   mergekit's YAML for adapters, as a recipe
    mergekit_fields  the values of its fields
    run        make what is not up to date, in order
    mergekit   mergekit's YAML for adapters, as a recipe

The YAML has two parts. `inputs` are names for what exists; `steps` are commands, whose keys are the long names of their
options and arguments. Where a key takes an adapter or a model, a name of an input or of an earlier step stands for it:

    inputs:
      base: hf://lab/base
      style: {path: adapters/style, digest: 'blake3:…'}
    steps:
      half: {command: combine, adapters: [style], weight: [0.5]}
      merged: {command: merge, base: base, adapters: [half], dtype: bf16}
"""
