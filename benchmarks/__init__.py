"""Speed and claims: `python -m benchmarks.<name>`; docs/benchmarks.md and docs/results.md have the figures."""

import pipelines  # before torch: it says how threads wait
