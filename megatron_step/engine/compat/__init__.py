"""Private names of torch and megatron-core that this package uses, by subject; no other file touches one.

A comment at each says why it is used and in which version it was last seen. `tests/engine/compat` fails where one is
gone or does something else.
"""
