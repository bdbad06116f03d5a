"""A bundle: what is in it, as data, and the folder that it is.

files    opening, verifying and writing a bundle
specs    tensors and ranges of shapes: what goes into and comes out of a component
stamps   hashes of files, computed once
"""
