"""What can be studied, as data: mixers, architectures, tasks, recipes, studies, trials and their results.

Nothing here imports torch. Every value is frozen and round-trips through JSON; parameters, FLOPs and bytes of an
architecture are arithmetic.
"""
