"""The parts of a block. None of them communicates, except the vocabulary embedding, which stands outside the blocks."""
