"""Everything that survives a kill: files, what a run keeps, its batches and checkpoints, the lock, the processes.

files: files and folders that appear whole or not at all. kept: what a run has, and what it was begun with. shards,
checkpoints, rows: finished batches of samples, states of a training, rows of a table. lock: one start at a time.
processes: several at one piece of work. provenance: what decides about a result.
"""
