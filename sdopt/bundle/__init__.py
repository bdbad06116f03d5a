"""A bundle: what is in it, as data, and the folder that it is.

format   the manifest, field by field (README.md says what they mean)
decode   JSON into dataclasses, by their annotations
files    opening and verifying a bundle
write    writing one, or a folder in it
unfinished  folders that appear complete or not at all, and what is left of those that did not
precision  the words for it
presets  named settings that were measured, in files beside the manifest
specs    tensors and ranges of shapes: what goes into and comes out of a component
disk     small files read strictly and written by one rename; this user's folders
graphs   where a graph's weights are, read from its file
weight_files  these are where they may be, and their file holds little else
stamps   hashes of files, computed once
"""
