"""From a float checkpoint to a quantized one, in msModelSlim's formats: `python -m qtp.quantize`."""
