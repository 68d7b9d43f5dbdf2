"""Videos to a cache of latents: what one shard takes, and what all shards together say."""
