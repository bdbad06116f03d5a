"""A model in one .safetensors file, as the original code and most model sites write it, becomes a diffusers folder.

file        the file itself: names, shapes, dtypes and tensors
names       where a parameter of a diffusers model is in the file
convert     every parameter from the file, and every tensor of the file used; then the folder
recognise   which published model the file is of
published   the configurations of published models
adapter     a ControlNet in one file
control_lora  a ControlNet as the difference from a UNet
clip        CLIP's tokenizer
"""
