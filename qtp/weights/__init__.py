"""From checkpoint files to the shard of a rank. `names` declares, `store` reads boxes, `loader` fills tensors."""
