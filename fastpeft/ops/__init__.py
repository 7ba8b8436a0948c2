"""Fused operations: each family is one file with its torch reference, autograd and public function."""
