"""Tensor operations behind one API."""
