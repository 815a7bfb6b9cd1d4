"""What travels between rank 0 and the others beside tensors: messages, their encoding, and the channel. Imports no torch."""
