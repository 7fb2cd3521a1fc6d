"""One file per op: its shapes, its providers and what its result costs at least."""
