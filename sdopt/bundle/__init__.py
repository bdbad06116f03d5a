"""A bundle: what is in it, as data, and the folder that it is.

format   the manifest, field by field (README.md says what they mean)
decode   JSON into dataclasses, by their annotations
files    opening, verifying and writing a bundle
precision  the words for it
specs    tensors and ranges of shapes: what goes into and comes out of a component
disk     small files read strictly and written by one rename; this user's folders
stamps   hashes of files, computed once
"""
