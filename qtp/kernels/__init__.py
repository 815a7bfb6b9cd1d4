"""The arithmetic of a layer: native code for CPUs, and its fallback in torch's own operations, chosen once at start."""
