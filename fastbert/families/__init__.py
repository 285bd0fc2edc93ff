"""Models of other people as fastbert computes them: a file says where a family's layers have their modules."""
