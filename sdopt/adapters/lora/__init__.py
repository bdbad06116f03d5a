"""LoRA and its kin: files that change the weights of a model, without a new export.

names        every way in which files spell the name of a module
file         one file: its tensors by module, its metadata
algorithms   the arithmetic: from a module's tensors to the change of its weight
merge        weights = base + sum of changes, for all files that are in use
"""
