"""Build engines for one device from a bundle's graphs. Needs onnx and onnx-ir, never torch.

jobs       `sdopt build`: which engines, where they are kept, what is checked once they are there
target     the library and the GPU
options    the options of a build, and those of one engine
recipe     which engines are built from a bundle, and for which sizes
derive     the passes below, in their order
trt_build  a TensorRT plan from a graph; trt_errors: what its errors mean
trt_types  types for TensorRT 8.6, which does not take them from the graph
checks     faults of a finished plan; agree: whether its rows agree

join_control  ControlNets and the UNet as one graph
fuse_step  make guidance and the sampler's row a part of the UNet
halves     repeat a tensor for the two halves of guidance a fixed number of times
half       float32 to float16 or bfloat16, with named float32 islands
lower      opset 23 in older operators, all of it or only what a parser does not know
fixed      lengths that never change, written into the graph
simulate   a half graph as float32 arithmetic that rounds like half, to measure it on any machine
diagnose   where a half graph leaves the float32 one; this one needs ONNX Runtime, as `simulate` does

A pass changes an `onnx_ir.Model` in place, and returns it or a report. Each pass may be left out. `fuse_step` gives the
sampler's nodes names that `half` keeps in float32. `lower` takes either precision, and computes norms in float32.
"""
