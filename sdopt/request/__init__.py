"""What a caller asks for.

kinds     kinds of values: what is allowed, how a value is read and described; arrays: of arrays and pictures
keyword   what is declared of one keyword
options   every keyword, declared once
keywords  what is made of that table: checks, defaults, records
together  how the keywords of one request fit together
plan      a request, resolved and proven against a bundle
"""
