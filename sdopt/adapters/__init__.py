"""What a user adds to a bundle at run time: LoRA files."""
