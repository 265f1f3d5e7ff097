"""What tests of kvrag, and of code that builds on it, share: `stores` (contract suite), `models` (tiny ones).

Nothing is imported here: `stores` needs pytest, `models` does not.
"""
