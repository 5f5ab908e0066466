"""The library: everything that is computed."""

import os

# Threads that spin while they wait make two busy cores several times slower; read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
