"""What dialects are made of.

dialect    what a dialect's module offers
listing    what lies at a path: file names, headers and small JSON files, read when a dialect asks for them
once       an adapter that a task opens again, which is read once
folders    adapters in the folders below one that holds none
memory     state dicts as the files that they would be saved as
items      the adapters and models in a folder and below it, by the names of their files
build      a draft of what is read: tensors sorted by module and part, made into the updates of an adapter
alphas     alphas that no tensor holds: those of the header, or none
losses     what foreign layouts commonly cannot say of an adapter
hashes     the hashes in a header, of the data alone
facts      what the header entries say that people look for: trigger words, tags, steps, base
places     where a fact stands in the files of each dialect
metadata   the header entries of a file, which stay with an adapter from reading to writing
read_as    what a call says of an adapter that its file does not: its dialect, its alpha
numbers    single numbers in a file: alphas that are read, scalings that one value must stand for
pickles    state dicts of `torch.save`
values     what may stand where a path stands: values in memory that hold an adapter
writing    an adapter into the files of a dialect, or the losses that forbid it
"""
