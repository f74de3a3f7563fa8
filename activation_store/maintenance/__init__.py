"""Verify and repair a store, and measure how well its shuffle mixes documents."""
