"""The hot operations: attention, routed experts, norm, and the output head with its loss, a module each.

A kernel is a pure function over tensors: it knows no config, no module and no cache policy. Where there is
more than one way to compute it, the function itself chooses by what it is given (device, shape), and the
tests hold every way to the same plain reference.
"""
