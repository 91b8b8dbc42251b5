"""Unlearning methods that people use today, in this package's terms, to be measured against.

Each is a config; `registry` names them, `tune` gives each the same small budget.
"""
