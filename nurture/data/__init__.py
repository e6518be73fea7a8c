"""From files, hub datasets and the world to batches: rows, sources, shards, mixture, packing, decontamination."""
