"""Pictures: files, masks, tiles and previews.

pil      pictures as PIL and as arrays, their PNGs and parameters
chunks   PNGs whose texts are too long for Pillow
masks    masks, and the region that is painted large
tiling   decoding and encoding in tiles
preview  small pictures of latents, without the decoder
"""
