"""Benchmarks: what is measured for people, never asserted by tests."""
