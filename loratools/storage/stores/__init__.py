"""Object stores and servers: `s3://`, `gs://`, `az://`, `https://`, wherever a path is taken. Nothing here is imported
before one is asked for; `obstore` (the extra `cloud`) does the talking, with its own chain of credentials.

    address    where a reference leads, and how it is shown: nothing secret
    client     one store: lists, ranges that are checked, uploads
    faults     what to say of what fails, and what is asked for again
    ranges     a file that is read by ranges: cut at its tensors, several on their way, in constant memory
    skeleton   a reference becomes a folder: headers and small files, and ranges for the rest
    landing    an output goes to a store file by file, and is none before its last one
    probed     the usual names, where a server lists nothing
"""
