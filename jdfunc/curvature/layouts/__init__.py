"""Which block of F every parameter belongs to, found once and checked."""
