"""What this machine has, what is missing or broken, and what to do about it.

Whatever may be broken is only touched in child processes with a time limit: a library that crashes, hangs or prints costs one line.
Nothing is imported here, since each child imports this package first.
"""
