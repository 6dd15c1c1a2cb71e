"""Other normalizations for small batches, one file each.

Registered as ``ws_mm.<Name>``; docs/zoo.md compares them.
"""
