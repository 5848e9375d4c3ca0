"""Names of modules: wrappers around them, compact patterns for many, and selections by pattern."""
