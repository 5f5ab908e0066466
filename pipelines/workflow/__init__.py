"""How a stage runs: what it trains, where its things lie, what its outcome depends on, what it reports."""
