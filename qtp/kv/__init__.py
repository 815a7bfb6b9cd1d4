"""Paged KV memory: `blocks` says which block belongs to whom (plain Python), `cache` holds the tensors."""
