"""The library: everything that is computed."""

import os

# Threads that spin long while they wait make two busy processes several times slower, threads that never do make one process
# slower by a third: let them spin for a moment. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
