"""How a stage runs: what it trains, where its files are, what its outcome depends on, what it reports."""
