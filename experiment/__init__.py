"""What stands behind the scripts: flags, checking, one run from start to end, its results."""
