"""The denoising loop.

start  the sample that the loop begins with: noise, a picture, a masked picture
model  the UNet with guidance
loop   the steps, on the host or on a device
"""
