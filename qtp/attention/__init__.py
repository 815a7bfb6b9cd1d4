"""Attention over paged KV memory. A backend plans once a step and runs once a layer."""
