"""More judges than `common.judges` has, and what can be said of any: agreement, bias, ratings."""
