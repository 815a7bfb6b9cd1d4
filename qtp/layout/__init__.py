"""How a model is cut over ranks: pure arithmetic on shapes, no tensors and no torch.

`split` cuts one tensor, `leaves` cuts what a rank holds of a sum's inner dimension, `spec` ties a tensor of the running model to
tensors of the checkpoint, `coverage` proves that the boxes of all ranks together hold every element.
"""
