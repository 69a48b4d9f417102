"""Export: a stored cell as a checkpoint that other software loads, verified before it gets its name."""
