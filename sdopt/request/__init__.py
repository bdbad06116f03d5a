"""What a caller asks for.

options  every keyword, its type and its check
plan     a request, resolved and proven against a bundle
"""
