"""Programs that measure one framework each, in processes of their own (`contest.py` starts them).

Those of other frameworks import nothing of effv2_jax: they run in those frameworks' environments.
"""
