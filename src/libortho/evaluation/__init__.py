"""How well a split separates: metrics, the TOFU job, and the report that people look at."""
