"""Other people's clients against a running gateway; `python` and `node` have environments of their own and
are no packages.
"""
