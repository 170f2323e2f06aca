"""Private names of torch and megatron-core that this package uses, by subject; no other file touches a private name.

A comment at each name says why it is used and in which version it was last seen. A test in `tests/engine/compat` fails
if a name is gone or does something else.
"""
