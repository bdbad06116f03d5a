"""What a caller asks for.

kinds     kinds of values: what is allowed, how a value is read and described
keyword   what is declared of one keyword
options   every keyword, declared once
together  how the keywords of one request fit together
plan      a request, resolved and proven against a bundle
"""
