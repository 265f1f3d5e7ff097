"""What tests of kvrag, and of code that builds on it, share.

`stores` and `memories` are contract suites, `models` tiny models.

Nothing is imported here: the suites need pytest, `models` does not.
"""
