"""What a dataset is: index, manifest, shards, the mapped catalogue; checking and looking at one."""
