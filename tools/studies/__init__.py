"""Studies: small networks trained to see what a method does."""
