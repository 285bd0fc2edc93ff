"""The ops, each in the module of its name: checks, the torch path, and the Triton kernel as a custom op.

Not re-exported here, because a function would hide the module of the same name.
"""
