"""Benchmarks of the worker; see README.md here. They are no part of the installed package."""
