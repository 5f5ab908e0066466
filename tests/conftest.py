import pipelines  # noqa: F401  (sets how OpenMP waits, before torch is imported)
