"""Build: what one device wants, derived from a bundle's graphs. Needs onnx and onnx-ir, never torch.

graph      reading and writing a graph with its weights, one at a time
fuse_step  guidance and the sampler's row become part of the UNet
half       float32 to float16 or bfloat16, with named float32 islands
rounded    a half graph as float32 arithmetic that rounds like half, to measure it on any machine
lower      opset 23 in the primitives of opset 17
diagnose   where a half graph leaves the float32 one

A pass takes an `onnx_ir.Model`, changes it in place and returns it or what it did. The order is fuse_step, half, lower;
each may be left out. `fuse_step` computes the sampler in float32 under names that `half` keeps, and `lower` takes
either precision, so that a norm that `half` leaves whole is computed in float32 when it is taken apart.
"""
