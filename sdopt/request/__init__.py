"""What a caller asks for.

kinds     kinds of values: what is allowed, how a value is read and described; arrays: of arrays and pictures
keyword   what is declared of one keyword
options   every keyword, declared once; options_picture, options_text: parts of it
keywords  what is made of that table: checks, defaults, records
calls     the arguments of decode, preview and encode
diffusers what users of diffusers type, and what to type here
hires     the second pass of hires fix
together  how the keywords of one request fit together; pictures: of pictures, masks and sizes
presets   what a preset of the bundle sets
plan      a request, resolved and proven against a bundle
"""
