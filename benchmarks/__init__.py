"""Benchmarks of speed and of the project's claims: `python -m benchmarks.<name>`.

Their figures are in docs/benchmarks.md and docs/results*.md.
"""

import pipelines  # before torch is imported, because it sets how torch's threads wait
