"""Build: what one device wants, derived from a bundle's graphs. Needs onnx and onnx-ir, never torch.

jobs       `sdopt build`: which engines, where they are kept, what is checked once they are there
target     the library and the GPU; options: what was asked for, and what one engine gets of it
recipe     which engines a bundle becomes, and for which sizes
derive     the passes below, in their order
trt_build  a graph into TensorRT's plan; trt_types: types where they are not in the graph (8.6)
checks     what is wrong with a finished plan; agree: whether its rows agree

fuse_step  guidance and the sampler's row become part of the UNet
halves     repeats of what both halves of guidance share, without counting
half       float32 to float16 or bfloat16, with named float32 islands
lower      opset 23 in older operators, all of it or only what a parser does not know
fixed      lengths that never change, written into the graph
simulate   a half graph as float32 arithmetic that rounds like half, to measure it on any machine
diagnose   where a half graph leaves the float32 one; this one needs ONNX Runtime, as `simulate` does

A pass takes an `onnx_ir.Model`, changes it in place and returns it or what it did. Each may be left out. `fuse_step`
computes the sampler in float32 under names that `half` keeps, and `lower` takes either precision, so that a norm that
`half` leaves whole is computed in float32 when it is taken apart.
"""
