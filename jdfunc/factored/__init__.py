"""Rows of a Jacobian kept factored: their types, their algebra."""
