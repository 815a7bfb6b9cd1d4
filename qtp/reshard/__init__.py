"""Offline: a checkpoint from any cut to any other. `python -m qtp.reshard`.

`cut` says which boxes go where and proves that none is lost, `transfer` moves the bytes, `journal` remembers what is done,
`folder` guards what is written to, `reshard` puts them together; `verify` proves the result from what lies in the files. `bins`
reads pytorch_model.bin, `convert` makes other floats.
"""
