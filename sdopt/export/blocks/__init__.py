"""What families are made of: the models that several of them have, each ready to become a `Part`.

text_encoder  CLIP's text encoders, with rows for textual inversion
unet          the UNet, with whatever a family's conditioning gives it
vae           the VAE's two sides, and what its configuration says of latents
lcm           what a latent consistency model changes in the defaults of its family
"""
