"""From a prompt to what conditions the UNet.

tokenizer          CLIP's byte-level tokenizer
weights            prompt syntax: (word:1.3), prompts of any length
textual_inversion  learnt words
encode             the encoders of a bundle
"""
