"""LibOrtho inside other packages. Each module here needs its package, and is imported with it."""
