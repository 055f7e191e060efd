"""Damaged input, case after case: recipes, records of a run, configurations, headers, lists of prompts."""
