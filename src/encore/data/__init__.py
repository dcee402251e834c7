"""From files to batches.

shards, formats, sources, token_cache     names -> files -> documents and pairs -> ids on disk, once
windows, examples, mixture                ids -> example i of each source, and whose turn it is
packing, layout, steps, workers           examples -> the arrays of a step, in this process or others
batch, pipeline                           arrays -> tensors
"""
