"""The harness: turns, gate, table, JSON and plot; a file of `bench.families` says what is run."""
