"""The denoising loop.

start    the sample that the loop begins with: noise, a picture, a masked picture
model    the seam to the network, and what wraps it: guidance, further channels
cache    the two UNets of a feature cache
program  what each call launches, chosen before the loop begins
board    the named tensors of a request, on the host or on a device
loop     one loop for every engine
upscale  latents at a larger size, for hires fix
batch    requests at different steps, in the same calls of the network
"""
